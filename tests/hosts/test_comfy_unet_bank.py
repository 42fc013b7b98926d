"""What runs share: nothing stale is read, nothing is computed twice, and nothing piles up.

A stale state shows as a difference to the same run with an empty bank; a state that was found as a run without a row
for the reference.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import comfy.hooks
import comfy.model_patcher
import comfy.sd
import comfy_extras.nodes_model_advanced
import pytest
import torch
from torch import Tensor

from inversion_core.attention import AttentionEdit
from inversion_core.bank import ReferenceBank
from inversion_core.hosts import comfy_references, comfy_run
from inversion_core.hosts.base import HostError
from inversion_core.hosts.comfy_references import BANK, model_key
from inversion_core.hosts.comfy_unet import attach, last_report
from inversion_core.injection import Injection
from inversion_core.presets import PRESETS
from inversion_core.reference import Reference

from .models import NOISE, POSITIVE, Patcher, demo_patcher, passes, prompt, random, sample

VISIBLE = 1e-3
A, B = Reference(random(1, 4, 16, 16, seed=1)), Reference(random(1, 4, 12, 20, seed=2))
BOTH = Injection(AttentionEdit(shape_query=1.0), (B,), shape=A, sites="all")
LAYER = "diffusion_model.output_blocks.1.1.transformer_blocks.0.attn1.to_k"
"""In the middle of the model: what is patched here shows in the states of the sites after it."""
LORA = {
    f"{LAYER}.lora_up.weight": random(128, 4, seed=11),
    f"{LAYER}.lora_down.weight": random(4, 128, seed=12),
}


@pytest.fixture(scope="module")
def model() -> Iterator[Patcher]:
    yield demo_patcher()
    for one in (with_lora, zsnr, eps):
        one.cache_clear()


@cache  # ComfyUI warns and collects garbage for a model whose patcher is gone while its clone is loaded
def with_lora(model: Patcher, strength: float) -> Patcher:
    return comfy.sd.load_lora_for_models(model, None, LORA, strength, 0.0)[0]


def rows_of(model: Patcher) -> int:
    return last_report(model).reference_rows


# --- found again ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"noise": random(1, 4, 16, 16, seed=55)},
        {"noise": random(2, 4, 16, 16, seed=56)},
        {"noise": random(1, 4, 24, 8, seed=57)},
        {"positive": prompt(150)},
        {"positive": prompt(101, area=(8, 8, 0, 8)) + prompt(103)},
        {"cfg": 1.0},
        {"negative": prompt(102, start_percent=0.0, end_percent=0.5)},
        {"negative": prompt(102, concat_latent_image=random(1, 4, 16, 16, seed=5), concat_mask=torch.ones(1, 16, 16))},
    ],
    ids=["same", "seed", "batch", "size", "prompt", "regions", "cfg 1", "negative in time", "inpainting"],
)
def test_another_run_with_the_same_model_and_references_costs_no_row(model: Patcher, other: dict) -> None:
    sample(attach(model, BOTH), steps=1)
    again = attach(model, replace(BOTH, appearance=(Reference(B.latent),), edit=AttentionEdit("extend", strength=0.7)))
    with passes(model) as seen:
        warm = sample(again, steps=1, **other)
    assert rows_of(again) == 0
    assert last_report(again).hits > 0
    assert last_report(again).rows == sum(one["rows"] for one in seen)
    BANK.clear()
    assert torch.equal(sample(again, steps=1, **other), warm)


def test_an_unchanged_patched_model_finds_its_states(model: Patcher) -> None:
    """ComfyUI hands the same LoRA model and the same sampling object on as long as their nodes do not change."""
    (sampled,) = comfy_extras.nodes_model_advanced.ModelSamplingDiscrete().patch(
        with_lora(model, 0.5), "v_prediction", False
    )
    sampled.set_model_compute_dtype(torch.float32)
    first = sample(attach(sampled, BOTH))
    again = attach(sampled.clone(), BOTH)
    assert torch.equal(sample(again), first)
    assert rows_of(again) == 0


def test_more_sites_or_steps_cost_only_what_is_missing(model: Patcher) -> None:
    fine = replace(BOTH, sites="output.3", shape=None, edit=AttentionEdit())
    sample(attach(model, fine), steps=3)
    more = attach(model, replace(fine, sites="output.2, output.3"))
    sample(more, steps=3)
    assert rows_of(more) == 3  # a pass gives all its sites at once, or none
    less = attach(model, fine)
    sample(less, steps=3)
    assert rows_of(less) == 0
    sample(less, steps=5)  # of the five levels the first, the middle and the last are those of three
    assert rows_of(less) == 2


def test_a_shape_reference_that_only_says_where_costs_no_row(model: Patcher) -> None:
    where = replace(A, mask=(random(1, 1, 16, 16, seed=8) > 0).float())
    patched = attach(model, replace(BOTH, edit=AttentionEdit(), shape=where, feature_strength=0.0))
    with passes(model) as seen:
        sample(patched)
    assert len([one for one in seen if one["grid"] == (12, 20)]) == rows_of(patched) == 3


# --- not stale --------------------------------------------------------------------------------------------------------


@cache
def zsnr(model: Patcher) -> Patcher:
    return comfy_extras.nodes_model_advanced.ModelSamplingDiscrete().patch(model, "v_prediction", True)[0]


@cache
def eps(model: Patcher) -> Patcher:
    return comfy_extras.nodes_model_advanced.ModelSamplingDiscrete().patch(model, "eps", False)[0]


CHANGES: dict[str, tuple[Callable[[Patcher], Patcher], Injection, dict[str, Any]]] = {
    "a LoRA": (lambda m: with_lora(m, 1.0), BOTH, {}),
    "its strength": (lambda m: with_lora(m, 0.5), BOTH, {}),
    "the sampling": (zsnr, BOTH, {}),
    "the prediction": (eps, BOTH, {}),
    "the negative prompt": (lambda m: m, BOTH, {"negative": prompt(160)}),
    "the reference's prompt": (lambda m: m, replace(BOTH, appearance=(replace(B, conditioning=prompt(161)),)), {}),
    "the reference": (lambda m: m, replace(BOTH, appearance=(Reference(random(1, 4, 12, 20, seed=3)),)), {}),
    "its noise": (lambda m: m, replace(BOTH, appearance=(replace(B, noise_seed=1),)), {}),
    "the levels": (lambda m: m, BOTH, {"denoise": 0.5}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_changes_nothing_stale_is_read(model: Patcher, name: str) -> None:
    change, injection, asked = CHANGES[name]
    first = sample(attach(with_lora(model, 0.9), BOTH), steps=1), sample(attach(model, BOTH), steps=1)
    patched = attach(change(model), injection)
    found = sample(patched, steps=1, **asked)
    assert rows_of(patched) > 0
    BANK.clear()
    assert torch.equal(sample(patched, steps=1, **asked), found)
    assert (found - first[1]).abs().max() > VISIBLE
    assert torch.equal(sample(attach(model, BOTH), steps=1), first[1])


def test_the_lora_is_in_the_references_states_and_in_the_projections(model: Patcher) -> None:
    """As if it had been merged into the weights."""
    merged = demo_patcher()
    weight = merged.model.get_parameter(f"{LAYER}.weight")
    with torch.no_grad():
        weight += LORA[f"{LAYER}.lora_up.weight"] @ LORA[f"{LAYER}.lora_down.weight"] * 0.7
    expected = sample(attach(merged, BOTH))
    torch.testing.assert_close(sample(attach(with_lora(model, 0.7), BOTH)), expected, atol=2e-5, rtol=1e-4)


def test_a_prompts_own_lora_stays_in_while_references_are_passed(model: Patcher) -> None:
    """ComfyUI patches it into the weights before each evaluation; a reference's pass in between takes it out.

    The picture is to see the LoRA and the references are not: as a model with the LoRA that finds, in the bank, what
    the model without it saw.
    """
    patched = attach(model, BOTH)
    hooks = comfy.hooks.create_hook_lora(LORA, 1.0, 0.0)
    found = sample(patched, positive=comfy.hooks.set_hooks_for_conditioning(POSITIVE, hooks), cfg=1.0)
    assert rows_of(patched) > 0

    BANK.clear()
    without = sample(patched, cfg=1.0)
    always = attach(with_lora(model, 1.0), BOTH)
    for key, entry in list(BANK._entries.items()):
        BANK.put(key._replace(model=model_key(always)), entry.tensors)
    torch.testing.assert_close(found, sample(always, cfg=1.0), atol=2e-5, rtol=1e-4)
    assert rows_of(always) == 0
    assert (found - without).abs().max() > VISIBLE


def test_names_of_objects_that_are_no_usual_keys(model: Patcher) -> None:
    class Unhashable:
        __hash__: Any = None

    weights = torch.zeros(3)
    for value, same in (
        (weights, weights.clone()),
        (torch.float16, torch.float16),
        ((1, "a"), (1, "a")),
        (print, print),
    ):
        keys = []
        for one in (value, same):
            clone = model.clone()
            clone.add_object_patch("test", one)
            keys += [model_key(clone), model_key(clone.clone())]
        assert len(set(keys)) == 1
        assert keys[0] != model_key(model)
    clone = model.clone()
    clone.add_object_patch("test", Unhashable())
    assert model_key(clone) != model_key(clone)  # nothing is known of it, so that nothing is found again


# --- long lives -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_bank(monkeypatch: pytest.MonkeyPatch) -> ReferenceBank:
    """Room for some of the references of a test, not for all."""
    bank = ReferenceBank(0, 1 << 20)
    for module in (comfy_references, comfy_run):
        monkeypatch.setattr(module, "BANK", bank)
    return bank


def test_200_runs_with_changing_references_leave_nothing_behind(model: Patcher, small_bank: ReferenceBank) -> None:
    fixed = attach(model, BOTH)
    expected = sample(fixed, steps=1, cfg=1.0)
    state = {name: value.clone() for name, value in model.model.state_dict().items()}
    presets = list(PRESETS.values())

    def run(i: int) -> None:
        size = ((6, 10), (8, 8), (9, 4))[i % 3]
        mask = (random(1, 1, *size, seed=i) > 0).float() if i % 2 else None
        references = [Reference(random(1, 4, *size, seed=1000 + i), mask, strength=1 + i % 4), B][: 1 + i % 2]
        shape = A if i % 5 else None
        noise = random(1, 4, 8, 8, seed=2000 + i)
        sample(
            attach(model, *presets[i % len(presets)].injections(references, shape)),
            noise=noise,
            steps=3 if i % 7 == 2 else 1,
            cfg=1.0 + i % 2,
        )

    def alive() -> tuple[int, int]:
        gc.collect()
        objects = gc.get_objects()
        held = {id(t) for e in small_bank._entries.values() for t in e.tensors.values()}
        return sum(issubclass(type(one), Tensor) and id(one) not in held for one in objects), len(objects)

    for i in range(20):
        _try(run, i)
    before = alive()
    for i in range(20, 200):
        _try(run, i)
        assert small_bank.stats.ram_bytes <= small_bank.ram_budget
        if i % 30 == 0:
            assert torch.equal(sample(fixed, steps=1, cfg=1.0), expected)
    tensors, objects = alive()
    assert small_bank.stats.evicted > 0
    assert tensors <= before[0]
    assert objects <= before[1] + 200  # less than two a run; what caches of Python and torch grow by
    assert torch.equal(sample(fixed, steps=1, cfg=1.0), expected)
    assert all(torch.equal(value, state[name]) for name, value in model.model.state_dict().items())


def _try(run: Callable[[int], None], i: int) -> None:
    """Some of the presets do not act at the only level of a single step, and say so."""
    try:
        run(i)
    except HostError as error:
        assert "changed nothing" in str(error)


def test_a_bank_without_room_costs_rows_and_changes_nothing(model: Patcher, monkeypatch: pytest.MonkeyPatch) -> None:
    patched = attach(model, BOTH)
    expected = sample(patched)
    rows = rows_of(patched)
    for module in (comfy_references, comfy_run):
        monkeypatch.setattr(module, "BANK", ReferenceBank(0, 0))
    for _ in range(2):
        assert torch.equal(sample(patched), expected)
        assert rows_of(patched) == rows
        assert last_report(patched).bytes == 0


@pytest.mark.parametrize("stopped", [False, True], ids=["finished", "cancelled"])
def test_after_a_run_the_device_is_empty(model: Patcher, monkeypatch: pytest.MonkeyPatch, stopped: bool) -> None:
    """However it ended."""
    calls: list[bool] = []
    monkeypatch.setattr(BANK, "offload", lambda: calls.append(True))
    patched = attach(model, BOTH)
    if stopped:
        clone = patched.clone()

        def cancel(*_: Any) -> Any:
            raise InterruptedError("on purpose")

        clone.set_model_unet_function_wrapper(cancel)
        with pytest.raises(InterruptedError):
            sample(clone)
    else:
        sample(patched)
    assert calls == [True]


def test_a_run_that_is_cancelled_leaves_whole_states_only(model: Patcher) -> None:
    """Cancelled in the reference's pass or in the picture's evaluation: the next run is as if it had not been."""
    patched = attach(model, BOTH)
    expected = sample(patched)
    layer = model.model.diffusion_model.output_blocks[2][1].transformer_blocks[0].attn1.to_out
    for countdown in (1, 2, 3, 5):  # the first pass, the second one, the picture, the next level
        BANK.clear()
        left = iter(range(countdown, 0, -1))

        def cancel(*_: Any, left: Iterator[int] = left) -> None:
            if next(left) == 1:
                raise InterruptedError("on purpose")

        handle = layer.register_forward_pre_hook(cancel)
        try:
            with pytest.raises(InterruptedError):
                sample(patched)
        finally:
            handle.remove()
        assert torch.equal(sample(patched), expected)


def test_measuring_changes_nothing_but_rounding(model: Patcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """The own keys are projected beside the references' in what is measured, and only there."""
    patched = attach(model, replace(BOTH, feature_strength=0.0))
    measured = sample(patched, noise=NOISE)
    assert last_report(patched).change
    monkeypatch.setattr("inversion_core.hosts.report.Report.wants_measure", lambda self, early: False)
    torch.testing.assert_close(sample(patched, noise=NOISE), measured, atol=2e-5, rtol=1e-4)
    assert not last_report(patched).change
