"""Injections on ComfyUI's UNets, sampled by ComfyUI itself with random weights.

The weights know no pictures, so these tests say what is changed, where, for which rows, and what is left alone.
"""

import copy
import hashlib
from dataclasses import replace
from typing import Any

import comfy.ldm.modules.attention
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.model_patcher
import comfy.patcher_extension
import pytest
import torch
from torch import Tensor, nn

from inversion_core.attention import AttentionEdit
from inversion_core.hosts.base import HostError
from inversion_core.hosts.comfy_references import BANK, ReferencePasses
from inversion_core.hosts.comfy_unet import KEY, attach, last_report, sites_of
from inversion_core.injection import Injection, Window
from inversion_core.noise import Trajectory
from inversion_core.reference import Reference

from .models import (
    NEGATIVE,
    NOISE,
    POOLED,
    POSITIVE,
    Patcher,
    demo_patcher,
    passes,
    prompt,
    random,
    sample,
    sd15_patcher,
    sdxl_patcher,
    with_low_memory,
    with_record_of_rows,
    with_record_of_site,
)

FINE = "output.3.0"
"""A self-attention of the demo model on the latent's own grid, 16x16."""
VISIBLE = 1e-3
"""The least largest change, in latents of unit variance, that counts as one; rounding is a hundred times smaller."""
ROUNDING: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}

A, B = Reference(random(1, 4, 16, 16, seed=1)), Reference(random(1, 4, 12, 20, seed=2))
BOTH = Injection(AttentionEdit(shape_query=1.0), (B,), shape=A, shape_window=Window(0.0, 0.6))
LEFT = torch.cat((torch.ones(1, 1, 128, 64), torch.zeros(1, 1, 128, 64)), dim=3)


@pytest.fixture(scope="module")
def model() -> Patcher:
    return demo_patcher()


@pytest.fixture(scope="module")
def plain(model: Patcher) -> Tensor:
    with torch.inference_mode():
        return sample(model, noise=NOISE)


def change(a: Tensor, b: Tensor) -> float:
    assert torch.isfinite(a).all()
    return float((a - b).abs().max())


def reads(reference: Reference, **changes: Any) -> Injection:
    return replace(Injection(AttentionEdit(), (reference,)), **changes)


def everything(patcher: Patcher) -> Any:
    """All of a ModelPatcher that a run could leave traces in, comparable with ==."""
    weights = hashlib.sha256()
    for name, value in sorted(patcher.model.state_dict().items()):
        weights.update(name.encode() + value.contiguous().numpy().tobytes())
    names = ("model_options", "patches", "object_patches", "wrappers", "callbacks", "injections", "hook_patches")
    return weights.hexdigest(), {name: skeleton(getattr(patcher, name)) for name in names}


def skeleton(value: Any) -> Any:
    """Containers by their contents, everything else by identity."""
    if isinstance(value, dict):
        return {key: skeleton(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [skeleton(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else id(value)


# --- neutral, attached, detached --------------------------------------------------------------------------------------


def test_the_random_model_is_a_fair_subject(plain: Tensor) -> None:
    """Were its output zero, or the same for every prompt, these tests would show nothing."""
    assert torch.isfinite(plain).all()
    assert plain.std() > 0.1
    assert (plain[0] - plain[1]).abs().max() > 0.1


def test_strength_zero_is_the_plain_model_bit_for_bit(model: Patcher, plain: Tensor) -> None:
    neutral = Injection(AttentionEdit(shape_query=1.0, strength=0.0), (B,), shape=A)
    assert torch.equal(sample(attach(model, neutral), noise=NOISE), plain)


def test_strength_zero_on_top_keeps_what_is_below(model: Patcher) -> None:
    below = attach(model, reads(B))
    assert torch.equal(sample(attach(below, reads(A, edit=AttentionEdit(strength=0.0)))), sample(below))


def test_the_model_put_in_is_untouched_by_runs_of_the_patched_one(model: Patcher, plain: Tensor) -> None:
    before = everything(model)
    patched = attach(model, BOTH)
    attached = everything(patched)
    assert change(sample(patched, noise=NOISE), plain) > VISIBLE

    assert everything(model) == before
    assert everything(patched) == attached
    assert torch.equal(sample(model, noise=NOISE), plain)


def test_runs_are_reproducible_whatever_lies_between(model: Patcher) -> None:
    patched = attach(model, BOTH)
    first = sample(patched)
    sample(attach(model, reads(A)), cfg=1.0)
    sample(model)
    assert torch.equal(sample(patched), first)


def test_clones_and_copies_share_the_injection(model: Patcher) -> None:
    patched = attach(model, BOTH)
    kind = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    for copied in (patched.clone().get_wrappers(kind, KEY), copy.deepcopy(patched.wrappers[kind])):
        (wrapper,) = copied if isinstance(copied, list) else copied[KEY]
        assert wrapper.injections == (BOTH,)
    assert torch.equal(sample(patched.clone()), sample(patched))


def test_a_failure_while_sampling_leaves_no_trace(model: Patcher, plain: Tensor) -> None:
    patched = attach(model, BOTH)
    expected = sample(patched)
    failing = patched.clone()
    calls = 0

    def fail_in_the_second_step(apply: Any, arguments: dict) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError("on purpose")
        return apply(arguments["input"], arguments["timestep"], **arguments["c"])

    failing.set_model_unet_function_wrapper(fail_in_the_second_step)
    before = everything(failing), everything(model)
    with pytest.raises(MemoryError, match="on purpose"):
        sample(failing)

    assert (everything(failing), everything(model)) == before
    assert torch.equal(sample(failing), expected)
    assert torch.equal(sample(model, noise=NOISE), plain)


# --- references -------------------------------------------------------------------------------------------------------


def test_references_change_the_output_each_in_its_own_way(model: Patcher, plain: Tensor) -> None:
    kinds = {
        "appearance A": reads(A),
        "appearance B": reads(B),
        "shape A": Injection(AttentionEdit("none", shape_query=1.0), shape=A),
        "shape B": Injection(AttentionEdit("none", shape_query=1.0), shape=B),
        "both": BOTH,
        "other noise": reads(replace(B, noise_seed=1)),
        "half": reads(B, edit=AttentionEdit(strength=0.5)),
        "extend": reads(B, edit=AttentionEdit("extend")),
    }
    outputs = {"plain": plain[:1]} | {name: sample(attach(model, kind)) for name, kind in kinds.items()}
    names = list(outputs)
    for i, first in enumerate(names):
        for second in names[:i]:
            assert change(outputs[first], outputs[second]) > VISIBLE, (first, second)


@pytest.mark.parametrize(
    "edit",
    [AttentionEdit("extend", qk_stats=True), AttentionEdit("normalise"), AttentionEdit("none", qk_stats=True)],
    ids=["extend with statistics", "normalise", "statistics alone"],
)
def test_the_edits_beyond_replace_act_too(model: Patcher, plain: Tensor, edit: AttentionEdit) -> None:
    """On the batch as on its rows one by one, and with a mask only inside it."""
    together = sample(attach(model, reads(B, edit=edit)), noise=NOISE)
    assert change(together, plain) > VISIBLE
    alone = torch.cat([sample(attach(model, reads(B, edit=edit)), noise=one[None]) for one in NOISE])
    torch.testing.assert_close(together, alone, **ROUNDING)
    masked = at_the_fine_site(attach(model, reads(B, edit=edit, sites=FINE, mask=LEFT)))
    untouched = at_the_fine_site(model)
    assert change(masked[..., :8], untouched[..., :8]) > VISIBLE
    if edit.reference != "normalise":  # there the keys inside change what the outside reads
        torch.testing.assert_close(masked[..., 8:], untouched[..., 8:], **ROUNDING)


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (15, 9), (33, 7), (2, 2)])
def test_references_have_any_size(model: Patcher, size: tuple[int, int]) -> None:
    reference = Reference(random(1, 4, *size, seed=3))
    noise = random(1, 4, 13, 18, seed=4)
    injection = replace(BOTH, appearance=(reference,), shape=reference, mask=LEFT)
    output = sample(attach(model, injection), noise=noise)
    assert output.shape == noise.shape
    assert change(output, sample(model, noise=noise)) > VISIBLE


def test_a_reference_is_passed_once_a_sigma_however_many_read_it(model: Patcher) -> None:
    tall, wide = Reference(random(1, 4, 18, 8, seed=5)), Reference(random(1, 4, 8, 18, seed=6))
    first = Injection(AttentionEdit(shape_query=1.0), (tall,), shape=tall)
    patched = attach(attach(model, first), replace(BOTH, appearance=(tall,), shape=wide, shape_window=Window()))
    for runs_together, prepared in ((True, patched), (False, with_low_memory(patched))):
        BANK.clear()
        with passes(model) as seen:
            sample(prepared, noise=NOISE, positive=POSITIVE + prompt(103), steps=3)
        assert [one["rows"] for one in seen if one["grid"] == (18, 8)] == [1, 1, 1]
        assert [one["rows"] for one in seen if one["grid"] == (8, 18)] == [1, 1, 1]
        assert [one["rows"] for one in seen if one["grid"] == (16, 16)] == ([9] * 3 if runs_together else [3] * 9)


def test_outside_its_window_a_reference_costs_nothing(model: Patcher) -> None:
    tall = Reference(random(1, 4, 18, 8, seed=5))
    with passes(model) as seen:
        sample(attach(model, reads(tall, window=Window(0.0, 0.3))), steps=4)
    assert 0 < len([one for one in seen if one["grid"] == (18, 8)]) < 4


def test_one_picture_may_give_both_through_two_nodes(model: Patcher) -> None:
    """Equal content, two objects: one is encoded with a mask, say. They share a place in the bank."""
    twin = Reference(A.latent)
    assert twin.content == A.content
    one = replace(BOTH, appearance=(A,), shape=A)
    for pair in ((A, twin), (twin, A)):
        output = sample(attach(model, replace(one, appearance=(pair[0],), shape=pair[1])))
        assert torch.equal(output, sample(attach(model, one)))


def test_twins_may_be_read_at_different_sites(model: Patcher) -> None:
    twin = Reference(A.latent)
    coarse = "output.1"
    two = attach(attach(model, reads(A, sites=coarse)), reads(twin, sites=FINE))
    same = attach(attach(model, reads(A, sites=coarse)), reads(A, sites=FINE))
    assert torch.equal(sample(two), sample(same))


def test_what_the_reference_mask_hides_cannot_reach_the_output(model: Patcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens in the bank are exchanged: the reference's pass itself mixes all of the picture."""
    mask = torch.zeros(1, 1, 12, 20)
    mask[..., :8] = 1
    patched = attach(model, reads(replace(B, mask=mask)))
    expected = sample(patched)
    captured = ReferencePasses._pass

    def spoil(visible: bool) -> None:
        BANK.clear()

        def spoilt(*args: Any) -> dict:
            states = {key: state.clone() for key, state in captured(*args).items()}
            for state in states.values():
                middle = state.shape[-1] * 8 // 20
                part = state[..., :middle] if visible else state[..., middle:]
                part.fill_(3.0 if visible else float("nan"))
            return states

        monkeypatch.setattr(ReferencePasses, "_pass", spoilt)

    spoil(visible=False)
    assert torch.equal(sample(patched), expected)
    spoil(visible=True)
    assert change(sample(patched), expected) > VISIBLE


def test_a_thin_object_is_still_read(model: Patcher) -> None:
    """One cell of the latent is a quarter of a token of the coarse level, less than the half that counts fully."""
    mask = torch.zeros(1, 1, 12, 20)
    mask[..., 5, 7] = 1
    output = sample(attach(model, reads(replace(B, mask=mask))))
    assert change(output, sample(attach(model, reads(B)))) > VISIBLE


def test_the_reference_sees_the_negative_prompt_or_its_own(model: Patcher) -> None:
    own = prompt(7)
    contexts = []
    for reference in (B, replace(B, conditioning=own)):
        with passes(model) as seen:
            sample(attach(model, reads(reference)), positive=POSITIVE + prompt(103), negative=NEGATIVE + prompt(104))
        contexts.append([one["context"] for one in seen if one["grid"] == (12, 20)])
    assert all(torch.equal(context, NEGATIVE[0][0]) for context in contexts[0])
    assert all(torch.equal(context, own[0][0]) for context in contexts[1])


@pytest.mark.parametrize(
    "placed",
    [
        {"start_percent": 0.5, "end_percent": 1.0},
        {"area": (8, 8, 8, 8)},
        {"mask": torch.eye(16)[None], "mask_strength": 1.0},
    ],
    ids=["time", "area", "mask"],
)
def test_a_negative_prompt_with_a_place_in_time_or_space_still_serves_the_reference(
    model: Patcher, placed: dict
) -> None:
    negative = prompt(102, **placed)
    with passes(model) as seen:
        sample(attach(model, reads(B)), negative=negative + NEGATIVE, steps=3)
    assert [one["rows"] for one in seen if one["grid"] == (12, 20)] == [1, 1, 1]


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_batch_of_three_is_the_three_one_by_one(model: Patcher) -> None:
    patched = attach(model, replace(BOTH, mask=LEFT))
    together = sample(patched, noise=NOISE)
    singly = torch.cat([sample(patched, noise=NOISE[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, singly, **ROUNDING)


def test_each_row_of_a_batch_of_prompts_follows_its_own(model: Patcher) -> None:
    patched = attach(model, BOTH)
    prompts = [prompt(seed) for seed in (101, 103, 104)]
    batch = [[torch.cat([one[0][0] for one in prompts]), {}]]
    singly = torch.cat([sample(patched, noise=NOISE[i : i + 1], positive=prompts[i]) for i in range(3)])
    torch.testing.assert_close(sample(patched, noise=NOISE, positive=batch), singly, **ROUNDING)


def test_cfg_one_is_the_positive_row_alone(model: Patcher, plain: Tensor) -> None:
    patched, calls = with_record_of_rows(attach(model, BOTH))
    alone = sample(patched, cfg=1.0)
    assert calls == [[0]] * 3
    with_both, calls = with_record_of_rows(attach(model, BOTH))
    with_both.model_options["disable_cfg1_optimization"] = True
    torch.testing.assert_close(sample(with_both, cfg=1.0), alone, **ROUNDING)
    assert calls == [[1, 0]] * 3
    assert change(alone, sample(model, cfg=1.0)) > VISIBLE


TWO_PROMPTS = POSITIVE + prompt(103)
REGIONAL = prompt(101, area=(8, 8, 4, 8), strength=0.8) + prompt(103)


@pytest.mark.parametrize("rows", ["all", "positive"])
@pytest.mark.parametrize("positive", [POSITIVE, TWO_PROMPTS, REGIONAL], ids=["one prompt", "two prompts", "regional"])
def test_separate_calls_give_what_joint_ones_do(model: Patcher, positive: list, rows: Any) -> None:
    injection = replace(BOTH, mask=LEFT, rows=rows)
    joint, joint_calls = with_record_of_rows(attach(model, injection))
    split, split_calls = with_record_of_rows(with_low_memory(attach(model, injection)))

    together = sample(joint, noise=NOISE[:2], positive=positive)
    apart = sample(split, noise=NOISE[:2], positive=positive)

    assert max(len(call) for call in joint_calls) == (3 if positive is TWO_PROMPTS else 2)
    assert {len(call) for call in split_calls} == {1}
    torch.testing.assert_close(together, apart, **ROUNDING)
    assert change(together, sample(model, noise=NOISE[:2], positive=positive)) > VISIBLE


def test_a_region_that_is_the_whole_picture_is_no_region(model: Patcher) -> None:
    patched = attach(model, replace(BOTH, mask=LEFT))
    torch.testing.assert_close(
        sample(patched, positive=prompt(101, area=(16, 16, 0, 0))), sample(patched, positive=POSITIVE), **ROUNDING
    )


def test_a_region_takes_its_own_part_of_the_output_mask(model: Patcher) -> None:
    """The mask covers the left half: the region there is edited, the one on the right keeps the plain attention."""
    for left, edited in ((0, True), (8, False)):
        positive = prompt(101, area=(16, 8, 0, left))
        outputs = []
        for prepared in (model, attach(model, reads(B, mask=LEFT, sites=FINE))):
            recording, seen = with_record_of_site(prepared, "output", 3)
            sample(recording, positive=positive, cfg=1.0, steps=1)
            outputs.append(torch.cat(seen))
        assert outputs[0].shape[1] == 16 * 8
        assert (change(*outputs) > VISIBLE) == edited


def test_only_the_positive_rows_are_edited_where_that_is_asked_for(model: Patcher) -> None:
    """ComfyUI puts the negative row first: [1, 0]."""
    predictions: list[list[Tensor]] = []

    def record(arguments: dict) -> list[Tensor]:
        predictions.append([one.clone() for one in arguments["conds_out"]])
        return arguments["conds_out"]

    for prepared in (model, attach(model, replace(BOTH, rows="positive")), attach(model, BOTH)):
        recording, calls = with_record_of_rows(prepared)
        recording.set_model_sampler_pre_cfg_function(record)
        sample(recording, noise=NOISE[:2], steps=1)
        assert calls == [[1, 0]]
    (positive, negative), (edited, kept), (_, edited_too) = predictions
    torch.testing.assert_close(kept, negative, **ROUNDING)
    assert change(edited, positive) > VISIBLE
    assert change(edited_too, negative) > VISIBLE


# --- masks and several injections, seen at one site -------------------------------------------------------------------


def at_the_fine_site(model: Patcher) -> Tensor:
    """What the fine site gives in the first step, as maps (rows, C, 16, 16); nothing before it is edited."""
    recording, outputs = with_record_of_site(model, "output", 3)
    sample(recording, steps=1)
    (only,) = outputs
    return only.transpose(1, 2).unflatten(2, (16, 16))


def test_outside_the_output_mask_the_attention_is_the_plain_one(model: Patcher) -> None:
    injection = reads(B, mask=LEFT, sites=FINE)
    before, after = at_the_fine_site(model), at_the_fine_site(attach(model, injection))
    everywhere = at_the_fine_site(attach(model, replace(injection, mask=None)))

    torch.testing.assert_close(after[..., 8:], before[..., 8:], **ROUNDING)
    torch.testing.assert_close(after[..., :8], everywhere[..., :8], **ROUNDING)
    assert change(after[..., :8], before[..., :8]) > VISIBLE
    assert change(everywhere[..., 8:], before[..., 8:]) > VISIBLE


def test_other_sites_are_left_alone(model: Patcher) -> None:
    """The sites before the one chosen: the rest of the network follows it."""
    outputs = []
    for prepared in (model, attach(model, reads(B, sites=FINE))):
        recording, seen = with_record_of_site(prepared, "output", 2)
        sample(recording, steps=1)
        outputs += seen
    assert torch.equal(*outputs)


def test_injections_with_disjoint_masks_do_not_disturb_each_other(model: Patcher) -> None:
    only = FINE
    left, right = reads(B, mask=LEFT, sites=only), reads(A, mask=1 - LEFT, sites=only)
    alone = [at_the_fine_site(attach(model, one)) for one in (left, right)]
    for order in ((left, right), (right, left)):
        both = at_the_fine_site(attach(attach(model, order[0]), order[1]))
        torch.testing.assert_close(both[..., :8], alone[0][..., :8], **ROUNDING)
        torch.testing.assert_close(both[..., 8:], alone[1][..., 8:], **ROUNDING)


def test_attaching_twice_leaves_the_first_with_one(model: Patcher) -> None:
    once = attach(model, reads(B))
    expected = sample(once)
    assert change(sample(attach(once, reads(A))), expected) > VISIBLE
    assert torch.equal(sample(once), expected)


# --- other packs ------------------------------------------------------------------------------------------------------


class OtherPack:
    """What another pack may hook into self-attention: harmless by default, and counting."""

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain
        self.calls = 0

    def __deepcopy__(self, memo: dict) -> "OtherPack":
        return self  # a clone of a ModelPatcher copies its options, bound methods with their objects

    def attn1_patch(self, n: Tensor, context: Tensor, value: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
        self.calls += 1
        return n, context, value * self.gain

    def attn1_output_patch(self, n: Tensor, extra: dict) -> Tensor:
        self.calls += 1
        return n * self.gain

    def override(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return func(*args, **kwargs) * self.gain

    def attn1_replace(self, q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        """As IPAdapter and others do it: heads from `n_heads`, and the width of one from `dim_head`."""
        self.calls += 1
        b, heads, width = q.shape[0], extra["n_heads"], extra["dim_head"]
        q, k, v = (x.view(b, -1, heads, width).transpose(1, 2) for x in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).reshape(b, -1, heads * width) * self.gain

    def on(self, model: Patcher, hook: str) -> Patcher:
        clone = model.clone()
        if hook == "attn1_patch":
            clone.set_model_attn1_patch(self.attn1_patch)
        elif hook == "attn1_output_patch":
            clone.set_model_attn1_output_patch(self.attn1_output_patch)
        elif hook == "override":
            clone.model_options["transformer_options"]["optimized_attention_override"] = self.override
        else:
            clone.set_model_attn1_replace(self.attn1_replace, "output", 3)
        return clone


HOOKS = ("attn1_patch", "attn1_output_patch", "override", "attn1_replace")
HALF_HIDDEN = replace(B, mask=torch.cat((torch.ones(1, 1, 12, 10), torch.zeros(1, 1, 12, 10)), dim=3))


@pytest.mark.parametrize("first", ["theirs", "ours"])
@pytest.mark.parametrize("hook", HOOKS)
def test_another_packs_hook_still_works_where_we_inject(model: Patcher, hook: str, first: str) -> None:
    injection = reads(HALF_HIDDEN, sites=FINE)
    results = {}
    for gain in (1.0, 0.0):
        other = OtherPack(gain)
        patched = (
            other.on(attach(model, injection), hook) if first == "ours" else attach(other.on(model, hook), injection)
        )
        results[gain] = at_the_fine_site(patched)
        assert other.calls > 0
    expected = at_the_fine_site(attach(model, injection))
    torch.testing.assert_close(results[1.0], expected, **ROUNDING)
    # Without their hook's part the attention would be untouched by gain; with gain 0 only the output's bias is left.
    assert change(results[0.0], expected) > VISIBLE


@pytest.mark.parametrize("hook", HOOKS)
def test_another_packs_hook_is_called_as_often_as_without_us(model: Patcher, hook: str) -> None:
    """At least: an edit may attend several times. Never less, and not at all in the reference's pass."""
    alone, along = OtherPack(), OtherPack()
    sample(alone.on(model, hook))
    sample(attach(along.on(model, hook), reads(B)))
    assert along.calls >= alone.calls > 0
    if hook in ("attn1_patch", "attn1_output_patch"):
        assert along.calls == alone.calls


def test_their_options_are_as_before_after_the_run(model: Patcher) -> None:
    patched = model
    for hook in HOOKS:
        patched = OtherPack().on(patched, hook)
    patched = attach(patched, BOTH)
    before = everything(patched)
    sample(patched)
    assert everything(patched) == before


def test_a_patch_that_changes_the_tokens_but_not_what_belongs_to_them_is_refused(model: Patcher) -> None:
    patched = attach(model, replace(BOTH, sites="output.0"))

    def merge(n: Tensor, context: Tensor, value: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
        if extra["block"] != ("output", 0):
            return n, context, value
        if n.shape[2] > 128:
            raise RuntimeError("only the model's own channels are expected here")
        return n[:, ::2], context, value

    patched.set_model_attn1_patch(merge)
    with pytest.raises(HostError, match=r"'output', 0.*changes the number of tokens.*disable that patch"):
        sample(patched)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_injection_that_never_acts_is_an_error(model: Patcher) -> None:
    with pytest.raises(HostError, match=r"changed nothing.*Widen start and end percent.*denoise"):
        sample(attach(model, reads(B, window=Window(1.0, 1.0))))


@pytest.mark.parametrize("sites", ["output.9", "decoder, nonsense", "", "decoder[9:]"])
def test_sites_that_the_model_lacks_are_refused_with_those_it_has(model: Patcher, sites: str) -> None:
    with pytest.raises(ValueError, match=r"means no self-attention.*input\.1, .*output\.3.*allowed besides"):
        attach(model, reads(B, sites=sites))


def test_a_window_before_a_partial_denoise_is_an_error(model: Patcher) -> None:
    with pytest.raises(HostError, match="changed nothing"):
        sample(attach(model, reads(B, window=Window(0.0, 0.2))), denoise=0.3)


def test_an_unknown_model_family_is_refused_by_its_name() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.diffusion_model = nn.Linear(2, 2)

    cpu = torch.device("cpu")
    other = comfy.model_patcher.ModelPatcher(Strange(), load_device=cpu, offload_device=cpu)
    with pytest.raises(HostError, match=r"Linear.*|SDXL") as error:
        attach(other, reads(B))
    assert all(word in str(error.value) for word in ("Linear", "SD1.x", "SDXL", "demo model", "checkpoint"))


@pytest.mark.parametrize("role", ["appearance", "shape"])
def test_a_reference_of_another_vae_is_refused(model: Patcher, role: str) -> None:
    wide: Any = Reference(random(1, 16, 8, 8, seed=8))
    with pytest.raises(HostError, match=r"16 latent channels.*works with 4.*VAE"):
        attach(model, replace(BOTH, **{role: (wide,) if role == "appearance" else wide}))


def test_an_inversion_is_read_along_its_way_and_only_by_its_own_kind_of_model(model: Patcher) -> None:
    sigmas = torch.tensor([20.0, 5.0, 1.0, 0.0])
    noise = random(4, 4, 12, 20, seed=21)
    inverted = replace(B, trajectory=Trajectory(sigmas, B.latent + sigmas.view(4, 1, 1, 1) * noise))
    assert change(sample(attach(model, reads(inverted))), sample(attach(model, reads(B)))) > VISIBLE
    with pytest.raises(HostError, match=r"inverted with another kind of model than this one.*Invert Reference"):
        attach(sd15_patcher(), reads(inverted))


# --- the families -----------------------------------------------------------------------------------------------------


SITES = {
    demo_patcher: "input.1 1, input.3 2, middle.0 2, output.0 2, output.1 2, output.2 1, output.3 1",
    sd15_patcher: "input.1 1, input.2 1, input.4 2, input.5 2, input.7 4, input.8 4, middle.0 8, output.3 4, "
    "output.4 4, output.5 4, output.6 2, output.7 2, output.8 2, output.9 1, output.10 1, output.11 1",
}
"""Each block with self-attention and its scale, as SD1.5's published configuration has them."""


@pytest.mark.parametrize("family", SITES)
def test_the_sites_of_a_family_have_its_own_names_and_scales(family: Any) -> None:
    found = sites_of(family().model.diffusion_model)
    assert ", ".join(f"{site.block} {site.scale}" for site in found) == SITES[family]


@pytest.mark.parametrize(("family", "block"), [(demo_patcher, 1), (sd15_patcher, 4), (sdxl_patcher, 1)])
def test_features_enter_after_the_decoders_first_block_with_attention(family: Any, block: int) -> None:
    model, noise, extra = family(), random(1, 4, 16, 16, seed=9), {}
    if family is sdxl_patcher:
        extra = {"pooled_output": random(1, POOLED, seed=10)}
    entered: dict[bool, list[Tensor]] = {}
    for edited in (False, True):
        shape = Injection(AttentionEdit("none", shape_query=1.0), shape=A, shape_sites="output.99?")
        clone = attach(model, shape) if edited else model.clone()
        seen = entered.setdefault(edited, [])

        def look(h: Tensor, skip: Tensor, options: dict, seen: list[Tensor] = seen) -> tuple[Tensor, Tensor]:
            seen.append(h.clone())
            return h, skip

        guider_patch = clone.clone()
        guider_patch.set_model_output_block_patch(look)
        sample(
            guider_patch, noise=noise, positive=prompt(101, **extra), negative=prompt(102, **extra), steps=1, cfg=1.0
        )
    same = [torch.equal(a, b) for a, b in zip(entered[False], entered[True], strict=True)]
    assert same.index(False) == block + 1  # their patch looks before ours writes: the change shows one block later


@pytest.mark.parametrize("family", [sd15_patcher, sdxl_patcher])
def test_the_stable_diffusion_families_work_alike(family: Any) -> None:
    model = family()
    noise, extra = random(2, 4, 16, 24, seed=9), {}
    if family is sdxl_patcher:
        extra = {"pooled_output": random(1, POOLED, seed=10)}
    run = {"noise": noise, "positive": prompt(101, **extra), "negative": prompt(102, **extra), "steps": 2}
    plain = sample(model, **run)
    patched = attach(model, replace(BOTH, mask=LEFT))

    output = sample(patched, **run)

    assert change(output, plain) > VISIBLE
    assert torch.equal(sample(model, **run), plain)
    # Rounding grows on its way through more and deeper blocks; half of what counts as a change is the bound here.
    torch.testing.assert_close(sample(with_low_memory(patched), **run), output, atol=VISIBLE / 2, rtol=0)


def test_every_decoder_self_attention_of_sdxl_is_edited() -> None:
    """Several transformer blocks a place: each is a site of its own."""
    model = sdxl_patcher()
    extra = {"pooled_output": random(1, POOLED, seed=10)}
    patched = attach(model, reads(B))
    sample(patched, positive=prompt(101, **extra), negative=prompt(102, **extra), steps=2)
    assert last_report(patched).calls == {
        f"output.{number}.{index}": 2 for number, depth in enumerate((2, 2, 2, 1, 1, 1)) for index in range(depth)
    }


def test_sdxls_reference_has_its_own_size_and_the_negatives_pooled_text() -> None:
    model = sdxl_patcher()
    pooled = {seed: random(1, POOLED, seed=seed) for seed in (11, 12)}
    with passes(model) as seen:
        sample(
            attach(model, reads(B)),
            positive=prompt(101, pooled_output=pooled[11]),
            negative=prompt(102, pooled_output=pooled[12]),
            steps=1,
        )
    (reference,) = (one for one in seen if one["grid"] == (12, 20))
    assert torch.equal(reference["y"][:, :POOLED], pooled[12])
    sizes = torch.cat([model.model.embedder(torch.tensor([float(side)])) for side in (96, 160)], dim=1)
    torch.testing.assert_close(reference["y"][:, POOLED : POOLED + 512], sizes)
