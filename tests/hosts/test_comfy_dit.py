"""Injections on ComfyUI's diffusion transformers, sampled by ComfyUI itself with random weights of every family.

The weights know no pictures, so these tests say what is changed, where, for which rows, and what is left alone. Where
the tokens lie and in which order the attentions run is written down here once more, from ComfyUI's own code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import comfy.model_patcher
import pytest
import torch
from torch import Tensor, nn

from inversion_core.attention import AttentionEdit
from inversion_core.hosts import comfy_dit
from inversion_core.hosts.base import HostError
from inversion_core.hosts.comfy_injection import attach, chosen, last_report, sites_of
from inversion_core.hosts.comfy_references import BANK, ReferencePasses
from inversion_core.hosts.families import FAMILIES, Sequences
from inversion_core.injection import Injection, Window
from inversion_core.presets import PRESETS
from inversion_core.reference import Reference

from .dit_models import FLUX2, KINDS, TEXT, WIDTH, Kind, evaluations
from .models import Patcher, random, sample, with_low_memory, with_record_of_rows

ROUNDING: dict[str, Any] = {"atol": 2e-4, "rtol": 1e-3}
VISIBLE = 1e-2
"""The least largest change, in latents of a deviation of at least 1, that counts as one."""

A, B = Reference(random(1, 16, 12, 16, seed=1)), Reference(random(1, 16, 10, 14, seed=2))
LEFT = torch.cat((torch.ones(1, 1, 96, 64), torch.zeros(1, 1, 96, 64)), dim=3)
SITE = "double.1.0"


class Subject:
    """A family's model and what it gives untouched."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kind: Kind = KINDS[name]
        self.model: Patcher = self.kind.build()
        self.plain = self.sample(self.model)

    def sample(self, model: Patcher, **changes: Any) -> Tensor:
        asked: dict[str, Any] = {
            "noise": self.kind.noise(2),
            "positive": self.kind.prompt(101),
            "negative": self.kind.prompt(102),
            "steps": 2,
        }
        return sample(model, **{**asked, **changes})

    def both(self) -> Injection:
        """Appearance and shape together; a video has no shape reference."""
        if self.name == "wan-video":
            return reads(B)
        return replace(reads(B), edit=AttentionEdit(shape_query=1.0), shape=A, shape_window=Window(0.0, 0.6))


@pytest.fixture(scope="module", params=KINDS)
def subject(request: pytest.FixtureRequest) -> Subject:
    with torch.inference_mode():
        return Subject(request.param)


@pytest.fixture(scope="module")
def flux() -> Subject:
    with torch.inference_mode():
        return Subject("flux")


@pytest.fixture(scope="module")
def sd3() -> Subject:
    with torch.inference_mode():
        return Subject("sd3")


def reads(reference: Reference, **changes: Any) -> Injection:
    return replace(Injection(AttentionEdit(), (reference,), sites="all"), **changes)


def change(a: Tensor, b: Tensor) -> float:
    assert torch.isfinite(a).all()
    return float((a - b).abs().max())


def weights_of(model: Patcher) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.model.state_dict().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


# --- neutral, attached, detached --------------------------------------------------------------------------------------


def test_the_random_model_is_a_fair_subject(subject: Subject) -> None:
    other = subject.sample(subject.model, positive=subject.kind.prompt(103))
    assert subject.plain.std() > 0.1
    assert change(subject.plain[:1], subject.plain[1:]) > VISIBLE
    assert change(other, subject.plain) > VISIBLE


def test_strength_zero_and_the_model_put_in_are_the_plain_model_bit_for_bit(subject: Subject) -> None:
    model, before = subject.model, weights_of(subject.model)
    options = str(model.model_options)
    neutral = subject.both()
    assert torch.equal(subject.sample(attach(model, replace(neutral, edit=AttentionEdit(strength=0.0)))), subject.plain)

    patched = attach(model, neutral)
    edited = subject.sample(patched)

    assert change(edited, subject.plain) > VISIBLE
    assert torch.equal(subject.sample(patched), edited)
    assert torch.equal(subject.sample(model), subject.plain)
    assert (weights_of(model), str(model.model_options)) == (before, options)


def test_the_sites_are_the_familys_own(subject: Subject) -> None:
    assert tuple(site.name for site in sites_of(subject.model)) == subject.kind.sites


def test_every_chosen_site_is_edited_in_every_step_and_no_other(subject: Subject) -> None:
    patched = attach(subject.model, reads(B))
    subject.sample(patched)
    report = last_report(patched)
    assert report.calls == dict.fromkeys(subject.kind.sites, 2)
    assert all(value > 0 for value in report.change.values())
    assert report.reading is not None
    assert report.reading.shape == (5, 7)
    late = attach(subject.model, reads(B, sites="late"))
    subject.sample(late)
    assert last_report(late).calls == dict.fromkeys(subject.kind.sites[-len(last_report(late).chosen) :], 2)


# --- the attention itself ---------------------------------------------------------------------------------------------


@dataclass
class Layout:
    """Tokens before the picture's, the picture's own, and after them, at a call; `call` counts from 0."""

    call: int
    before: int
    picture: int
    after: int


def layout(name: str, cells: tuple[int, int], frames: int = 1) -> Layout:
    """At the second block, of 2 x 2 cells a token."""
    tokens = frames * -(-cells[0] // 2) * -(-cells[1] // 2)
    call = {"sd3": 2, "wan": 2, "wan-video": 2, "lumina2": 3, "z-image": 3}.get(name, 1)
    if name == "z-image":
        return Layout(call, 32, tokens, -tokens % 32)
    return Layout(call, 0 if name.startswith("wan") else TEXT, tokens, 0)


@contextmanager
def attentions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, ...]]]:
    """What goes into every attention call, and what comes out, all as (B, H, N, D) in float64."""
    seen: list[tuple[Tensor, ...]] = []
    called = comfy_dit._Override.__call__

    def record(self: Any, func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        out = called(self, func, q, k, v, heads, *args, **kwargs)
        apart = kwargs.get("skip_reshape", False)
        given = (x if apart else x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
        seen.append(tuple(x.double() for x in (*given, out.reshape(*out.shape[:2], heads, -1).transpose(1, 2))))
        return out

    monkeypatch.setattr(comfy_dit._Override, "__call__", record)
    yield seen


def plain(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None = None) -> Tensor:
    """Attention as it is written; `weight` of each key before the softmax normalises."""
    logits = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    e = (logits - logits.amax(dim=-1, keepdim=True)).exp() * (1.0 if weight is None else weight)
    return e / e.sum(dim=-1, keepdim=True) @ v


def moved(name: str, x: Tensor, frame: int = 0, row: int = 0, column: int = 0) -> Tensor:
    """Queries or keys (B, H, N, D) of tokens as they would be further on: RoPE as it is written, in float64."""
    if name == "sd3":
        return x
    axes = zip((frame, row, column), (8, 4, 4) if name.startswith("wan") else (4, 6, 6), strict=True)
    angles = torch.tensor([by * 10_000.0 ** (-i / width) for by, width in axes for i in range(0, width, 2)]).double()
    even, odd = x.double()[..., ::2], x.double()[..., 1::2]
    return torch.stack(
        (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()), dim=-1
    ).flatten(-2)


def beside(name: str, keys: Tensor) -> Tensor:
    """Keys of B, 7 tokens wide, left of a picture of 8: Qwen-Image counts from the middle of each."""
    return moved(name, keys, column=-4 - (-3) - 7 if name == "qwen" else -7)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "sd3"])
def test_a_moved_key_is_the_models_own_at_that_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model itself is told other places for the picture's tokens; its first joint attention is compared."""
    subject = Subject(name)
    unet = subject.model.model.diffusion_model
    embedder = unet.rope_embedder if hasattr(unet, "rope_embedder") else unet.pe_embedder
    where, by = layout(name, (10, 14)), torch.tensor((2.0, 3.0, -7.0))
    keys = []
    for shift in (0, 1):
        BANK.clear()
        with monkeypatch.context() as patch, attentions(patch) as seen:
            own = type(embedder).forward

            def told(self: Any, ids: Tensor, shift: int = shift, own: Any = own) -> Tensor:
                ids = ids.clone()
                # With what fills the picture up; newer ComfyUI asks for the prompt's and Lumina's picture's one by one.
                apart = ids.shape[1] < where.before + where.picture
                if ids.shape[1] >= where.picture:
                    ids[:, 0 if apart else where.before :] += shift * by
                return own(self, ids)

            patch.setattr(type(embedder), "forward", told)
            # The injection's own turns are not looked at here: only what the reference's pass gives.
            patch.setattr(comfy_dit.DiTRun, "_move", lambda self, x, place: x)
            subject.sample(attach(subject.model, reads(B)), steps=1, cfg=1.0)
        first = seen[where.call - (2 if name.startswith("wan") else 1)]
        keys.append(first[1][:, :, where.before : where.before + where.picture])
    torch.testing.assert_close(keys[1], moved(name, keys[0], 2, 3, -7), atol=1e-4, rtol=1e-4)
    assert change(keys[1], keys[0]) > 0.1


@pytest.mark.parametrize("edit", ["replace", "shared", "extend", "statistics", "shape", "masked", "half"])
@pytest.mark.parametrize("name", KINDS)
def test_the_edited_attention_is_what_is_written_down(name: str, edit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the queries, keys and values that the model itself gave, for the reference and for the picture."""
    if (name, edit) == ("wan-video", "shape"):
        pytest.skip("a video has no shape reference")
    subject = Subject(name)
    mask = torch.zeros(1, 1, 10, 14)
    mask[..., 4:8] = 1
    injection = {
        "replace": reads(B, sites=SITE),
        "shared": reads(B, sites=SITE, positions="shared"),
        "extend": reads(B, sites=SITE, edit=AttentionEdit("extend", reference_bias=0.5)),
        "statistics": reads(B, sites=SITE, edit=AttentionEdit("extend", qk_stats=True)),
        "shape": reads(B, sites=SITE, edit=AttentionEdit(shape_query=1.0), shape=A),
        "masked": reads(replace(B, mask=mask), sites=SITE, mask=LEFT),
        "half": reads(B, sites=SITE, edit=AttentionEdit(strength=0.5)),
    }[edit]
    with attentions(monkeypatch) as seen:
        subject.sample(attach(subject.model, injection), steps=1, cfg=1.0)
    cells, frames = tuple(subject.kind.latent[-2:]), 3 if name == "wan-video" else 1
    calls = len(seen) // (3 if edit == "shape" else 2)
    ours, theirs = layout(name, cells, frames), layout(name, (10, 14))  # type: ignore[arg-type]
    q, k, v, out = seen[-calls + ours.call]
    ref_q, ref_k, ref_v, _ = seen[theirs.call]
    picture = slice(ours.before, ours.before + ours.picture)
    assert q.shape[2] == ours.before + ours.picture + ours.after

    untouched = plain(q, k, v)
    others = torch.ones(q.shape[2], dtype=torch.bool)
    others[picture] = False
    torch.testing.assert_close(out[:, :, others], untouched[:, :, others], atol=1e-5, rtol=1e-4)

    asking = q[:, :, picture]
    ref_q, ref_k, ref_v = (x[:, :, theirs.before : theirs.before + theirs.picture] for x in (ref_q, ref_k, ref_v))
    kept_k, kept_v = (k, v) if edit in ("extend", "statistics") else (k[:, :, others], v[:, :, others])
    if edit == "statistics":
        asking, kept_k = alike(asking, ref_q), k.clone()
        kept_k[:, :, picture] = alike(k[:, :, picture], ref_k)
    ref_k = ref_k if edit == "shared" else beside(name, ref_k)
    weight = torch.ones(theirs.picture, dtype=torch.float64)
    if edit == "extend":
        weight *= torch.tensor(0.5, dtype=torch.float64).exp()
    if edit == "masked":
        weight = mask[0, 0, ::2, ::2].flatten().double()
    if edit == "shape":
        asking = seen[calls + ours.call][0][:, :, picture]
    weights = torch.cat((torch.ones(kept_k.shape[2], dtype=torch.float64), weight))
    keys, values = (torch.cat((x, y.expand(2, -1, -1, -1)), dim=2) for x, y in ((kept_k, ref_k), (kept_v, ref_v)))
    expected = plain(asking, keys, values, weights)
    if edit == "half":
        expected = (expected + untouched[:, :, picture]) / 2
    if edit == "masked":
        inside = (torch.arange(8) < 4).repeat(6 * frames)[:, None]
        expected = torch.where(inside, expected, untouched[:, :, picture])
    torch.testing.assert_close(out[:, :, picture], expected.expand_as(out[:, :, picture]), atol=1e-5, rtol=1e-4)
    assert change(out[:, :, picture], untouched[:, :, picture]) > 1e-3


def alike(x: Tensor, other: Tensor) -> Tensor:
    """AdaIN over the tokens, each head and channel by itself."""
    mean, other_mean = x.mean(dim=2, keepdim=True), other.mean(dim=2, keepdim=True)
    std, other_std = (y.std(dim=2, keepdim=True, correction=0) for y in (x, other))
    return (x - mean) / std * other_std + other_mean


@pytest.mark.parametrize("name", ["lumina2", "z-image"])
def test_places_after_prompts_of_another_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lumina counts the prompt's tokens before the picture; the reference is seen with the shorter negative prompt."""
    subject = Subject(name)
    longer = [[random(1, 40, WIDTH, seed=103), {}]]
    for positions in ("shared", "own"):
        BANK.clear()
        with monkeypatch.context() as patch, attentions(patch) as seen:
            injection = reads(B, sites=SITE, positions=positions)
            subject.sample(attach(subject.model, injection), steps=1, cfg=1.0, positive=longer)
        ours, theirs = layout(name, (12, 16)), layout(name, (10, 14))
        text = 64 if name == "z-image" else 40  # filled up to a multiple of 32
        q, k, v, out = seen[len(seen) // 2 + ours.call]
        _, ref_k, ref_v, _ = seen[theirs.call]
        picture = slice(text, text + ours.picture)
        others = torch.ones(q.shape[2], dtype=torch.bool)
        others[picture] = False
        ref_k, ref_v = (x[:, :, theirs.before : theirs.before + theirs.picture] for x in (ref_k, ref_v))
        ref_k = moved(name, ref_k, text - theirs.before, 0, 0 if positions == "shared" else -7)
        keys, values = (
            torch.cat((x[:, :, others], y.expand(2, -1, -1, -1)), dim=2) for x, y in ((k, ref_k), (v, ref_v))
        )
        torch.testing.assert_close(out[:, :, picture], plain(q[:, :, picture], keys, values), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["flux", "chroma", "qwen", "lumina2"])
def test_a_shape_reaches_a_prompts_area_at_the_areas_own_places(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model counts the places of an area from the area's own corner (Qwen-Image from its middle)."""
    subject = Subject(name)
    injection = Injection(AttentionEdit("none", shape_query=1.0), sites=SITE, shape=A)
    area = (8, 6, 4, 10) if subject.kind.latent[1:-2] == (16,) else (1, 8, 6, 0, 4, 10)  # height, width, top, left
    with attentions(monkeypatch) as seen:
        subject.sample(attach(subject.model, injection), steps=1, cfg=1.0, positive=subject.kind.prompt(101, area=area))
    calls = len(seen) // 2
    ours, theirs = layout(name, (8, 6)), layout(name, (12, 16))
    q, k, v, out = seen[calls + ours.call]
    asked = seen[theirs.call][0][:, :, theirs.before : theirs.before + theirs.picture]
    asked = asked.unflatten(2, (6, 8))[:, :, 2:6, 5:8].flatten(2, 3)
    middle = {"row": 3 - 2 - 2, "column": 4 - 1 - 5} if name == "qwen" else {"row": -2, "column": -5}
    picture = slice(ours.before, ours.before + 4 * 3)
    expected = plain(moved(name, asked, **middle).expand(2, -1, -1, -1), k, v)
    torch.testing.assert_close(out[:, :, picture], expected, atol=1e-5, rtol=1e-4)
    assert change(out[:, :, picture], plain(q[:, :, picture], k, v)) > 1e-3


def test_an_area_that_is_no_whole_tokens_is_refused_with_a_shape(flux: Subject) -> None:
    model = attach(flux.model, Injection(AttentionEdit("none", shape_query=1.0), sites="all", shape=A))
    with pytest.raises(HostError, match=r"area of 7 x 6 latent cells.*multiples of 16 pixels"):
        flux.sample(model, positive=flux.kind.prompt(101, area=(7, 6, 0, 0)))


# --- rows, sizes, masks -----------------------------------------------------------------------------------------------


def test_a_batch_is_its_rows_one_by_one_and_joint_calls_are_separate_ones(subject: Subject) -> None:
    noise = subject.kind.noise(3)
    for edit in (AttentionEdit("extend", qk_stats=True), AttentionEdit("replace")):
        injection = replace(subject.both(), mask=LEFT)
        patched = attach(subject.model, replace(injection, edit=replace(edit, shape_query=injection.edit.shape_query)))
        together = subject.sample(patched, noise=noise)
        singly = torch.cat([subject.sample(patched, noise=noise[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(together, singly, **ROUNDING)
        apart, calls = with_record_of_rows(with_low_memory(patched))
        torch.testing.assert_close(subject.sample(apart, noise=noise), together, **ROUNDING)
        assert {len(call) for call in calls} == {1}


def test_only_the_positive_rows_are_edited_where_that_is_asked_for(subject: Subject) -> None:
    """At cfg 1, as guidance-distilled models are sampled, there are no others."""
    everything, positive = (attach(subject.model, reads(B, rows=rows)) for rows in ("all", "positive"))
    alone = subject.sample(everything, cfg=1.0)
    torch.testing.assert_close(subject.sample(positive, cfg=1.0), alone, **ROUNDING)
    assert change(subject.sample(everything), subject.sample(positive)) > VISIBLE
    patched, calls = with_record_of_rows(everything)
    subject.sample(patched, cfg=1.0)
    assert calls == [[0]] * 2


@pytest.mark.parametrize("size", [(12, 16), (4, 20), (7, 9), (2, 2)])
def test_references_have_any_size(subject: Subject, size: tuple[int, int]) -> None:
    patched = attach(subject.model, reads(Reference(random(1, 16, *size, seed=3)), mask=LEFT))
    assert change(subject.sample(patched), subject.plain) > VISIBLE


def test_a_picture_of_odd_size_is_edited_too(flux: Subject, sd3: Subject) -> None:
    for subject in (flux, sd3):
        noise = subject.kind.noise(1, (9, 13))
        output = subject.sample(attach(subject.model, reads(B, mask=LEFT)), noise=noise)
        assert output.shape == noise.shape
        assert change(output, subject.sample(subject.model, noise=noise)) > VISIBLE


def test_a_reference_is_passed_once_a_sigma_and_then_found_in_the_bank(subject: Subject) -> None:
    patched = attach(subject.model, reads(B))
    with evaluations(subject.model) as seen:
        first = subject.sample(patched)
        assert [shape[0] for shape in seen if shape[-2:] == (10, 14)] == [1, 1]
        seen.clear()
        assert torch.equal(subject.sample(patched), first)
        assert not [shape for shape in seen if shape[-2:] == (10, 14)]


def test_what_the_reference_mask_hides_cannot_reach_the_output(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = torch.zeros(1, 1, 10, 14)
    mask[..., :6] = 1
    patched = attach(subject.model, reads(replace(B, mask=mask)))
    expected = subject.sample(patched)
    captured = ReferencePasses._pass

    def spoil(visible: bool) -> Tensor:
        BANK.clear()

        def spoilt(*args: Any) -> dict:
            states = {key: state.clone() for key, state in captured(*args).items()}
            for state in states.values():
                part = state[..., :3] if visible else state[..., 3:]
                part.fill_(3.0 if visible else float("nan"))
            return states

        monkeypatch.setattr(ReferencePasses, "_pass", spoilt)
        return subject.sample(patched)

    assert torch.equal(spoil(visible=False), expected)
    assert change(spoil(visible=True), expected) > VISIBLE


def test_only_what_the_edit_needs_is_kept_of_a_reference(flux: Subject) -> None:
    """Keys and values; queries of the shape alone, and of all where statistics are matched."""
    asked: dict[str, set[str]] = {}
    for name, injection in {
        "reads": reads(B, sites="single"),
        "statistics": reads(B, sites="single", edit=AttentionEdit("extend", qk_stats=True)),
        "shape": Injection(AttentionEdit("none", shape_query=1.0), sites="single", shape=A),
    }.items():
        BANK.clear()
        flux.sample(attach(flux.model, injection))
        asked[name] = {key.rsplit(".", 1)[1] for entry in BANK._entries.values() for key in entry.tensors}
        assert all(key.startswith("single.") for entry in BANK._entries.values() for key in entry.tensors)
    assert asked == {"reads": {"k", "v"}, "statistics": {"q", "k", "v"}, "shape": {"q"}}


def test_a_lora_makes_a_new_model_of_it(sd3: Subject) -> None:
    """Keys and values are of the weights, so those of other weights must not be found."""
    other = sd3.model.clone()
    name = "diffusion_model.joint_blocks.1.x_block.attn.qkv.weight"
    other.add_patches({name: (0.1 * torch.ones(384, 128),)})
    sd3.sample(attach(sd3.model, reads(B)))
    with evaluations(sd3.model) as seen:
        sd3.sample(attach(other, reads(B)))
    assert len([shape for shape in seen if shape[-2:] == (10, 14)]) == 2


# --- further pictures in the sequence, other packs --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_pictures_that_the_prompt_brings_are_not_mistaken_for_the_output(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kontext and Qwen-Image-Edit: their tokens come last, are never edited, and are read like the prompt's."""
    subject = Subject(name)
    given = random(1, *subject.kind.latent[1:-2], 6, 8, seed=7)
    asked = {"positive": subject.kind.prompt(101, reference_latents=[given]), "cfg": 1.0, "steps": 1}
    with attentions(monkeypatch) as seen:
        subject.sample(attach(subject.model, reads(B, sites=SITE)), **asked)
    calls = len(seen) // 2
    q, k, v, out = seen[calls + 1]
    picture = slice(TEXT, TEXT + 6 * 8)
    assert seen[1][0].shape[2] == TEXT + 5 * 7  # the reference's own pass goes without
    assert q.shape[2] == picture.stop + 3 * 4
    others = torch.ones(q.shape[2], dtype=torch.bool)
    others[picture] = False
    torch.testing.assert_close(out[:, :, others], plain(q, k, v)[:, :, others], atol=1e-5, rtol=1e-4)
    keys, values = (
        torch.cat((x[:, :, others], y.expand(2, -1, -1, -1)), dim=2)
        for x, y in ((k, beside(name, seen[1][1][:, :, TEXT:])), (v, seen[1][2][:, :, TEXT:]))
    )
    torch.testing.assert_close(out[:, :, picture], plain(q[:, :, picture], keys, values), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_another_packs_override_still_works_where_we_inject(subject: Subject, first: str) -> None:
    results, injection = {}, reads(B)
    for gain in (1.0, 0.5):
        calls = 0

        def override(func: Any, *args: Any, gain: float = gain, **kwargs: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return func(*args, **kwargs) + (1 - gain)  # a factor would vanish in Lumina's normalisation

        model = subject.model if first == "theirs" else attach(subject.model, injection)
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = override
        results[gain] = subject.sample(model if first == "ours" else attach(model, injection))
        assert calls > 0
    expected = subject.sample(attach(subject.model, injection))
    torch.testing.assert_close(results[1.0], expected, **ROUNDING)
    assert change(results[0.5], expected) > VISIBLE


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen", "wan"])
def test_where_another_pack_skips_a_block_the_others_keep_their_own_references(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As skip-layer guidance does: the third block still reads what the third block saw."""
    subject = Subject(name)
    skipped, third = ("double_block", 0), {"flux": "single.0.0"}.get(name, "double.2.0")
    model = subject.model.clone()
    model.set_model_patch_replace(lambda args, _: args, "dit", *skipped)
    seen: list[tuple[str, Tensor]] = []
    prepare = comfy_dit.Session.prepare

    def look(self: Any, site: str, *args: Any) -> Any:
        call = prepare(self, site, *args)
        if call is not None:
            seen.append((site, call.parts[0].reads[0].k))
        return call

    monkeypatch.setattr(comfy_dit.Session, "prepare", look)
    subject.sample(attach(model, reads(B, sites=f"all, {third}")), steps=1, cfg=1.0)
    skipping = dict(seen)
    seen.clear()
    subject.sample(attach(subject.model, reads(B)), steps=1, cfg=1.0)
    whole = dict(seen)
    assert set(whole) - set(skipping) == {site for site in whole if site.startswith("double.0")}
    assert all(torch.equal(skipping[site], whole[site]) for site in skipping)


def test_tokens_that_nobody_told_of_are_refused(flux: Subject) -> None:
    model = attach(flux.model, reads(B))

    def longer(args: dict) -> dict:
        more = {name: torch.cat((args[name], args[name][:, :2]), dim=1) for name in ("txt", "txt_ids")}
        return {**args, **more}

    model.set_model_patch(longer, "post_input")
    with pytest.raises(HostError, match=r"at double\.0\.0.*57 tokens.*prompt \(7\).*6 x 8.*explain 55.*disable it"):
        flux.sample(model)


def test_a_mask_over_keys_is_followed_and_one_over_pairs_refused(
    flux: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = TEXT + 6 * 8

    def masked(mask: Tensor) -> Patcher:
        model = flux.model.clone()

        def replaced(args: dict, extra: dict) -> Any:
            seen = mask if args["img"].shape[1] == 6 * 8 else None
            return extra["original_block"]({**args, "attn_mask": seen})

        model.set_model_patch_replace(replaced, "dit", "double_block", 1)
        return attach(model, reads(B, sites=SITE))

    keys = torch.zeros(1, 1, tokens)
    keys[..., :3] = -torch.inf
    with attentions(monkeypatch) as seen:
        flux.sample(masked(keys), steps=1, cfg=1.0)
    q, k, v, out = seen[len(seen) // 2 + 1]
    _, ref_k, ref_v, _ = seen[1]
    read_k, read_v = (
        torch.cat((x[:, :, 3:TEXT], y.expand(2, -1, -1, -1)), dim=2)
        for x, y in ((k, beside("flux", ref_k[:, :, TEXT:])), (v, ref_v[:, :, TEXT:]))
    )
    torch.testing.assert_close(out[:, :, TEXT:], plain(q[:, :, TEXT:], read_k, read_v), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out[:, :, :TEXT], plain(q[:, :, :TEXT], k[:, :, 3:], v[:, :, 3:]), atol=1e-5, rtol=1e-4)
    with pytest.raises(HostError, match=r"at double\.1\.0.*attention mask \(1, 55, 55\).*'multiply'"):
        flux.sample(masked(torch.zeros(1, tokens, tokens)))


# --- newer models, newer ComfyUI --------------------------------------------------------------------------------------


def test_flux_2_is_edited_like_flux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class is Flux's. A token is one cell, and its places have four axes, at another base."""
    model, reference = FLUX2.build(), Reference(random(1, 128, 5, 7, seed=2))
    asked: dict[str, Any] = {"positive": FLUX2.prompt(101), "negative": FLUX2.prompt(102), "steps": 1, "cfg": 1.0}
    noise = FLUX2.noise(2)
    plain_picture = sample(model, noise=noise, **asked)
    neutral = attach(model, reads(reference, edit=AttentionEdit(strength=0.0)))
    assert torch.equal(sample(neutral, noise=noise, **asked), plain_picture)
    with attentions(monkeypatch) as seen:
        edited = sample(attach(model, reads(reference, sites=SITE)), noise=noise, **asked)
    assert change(edited, plain_picture) > VISIBLE
    q, k, v, out = seen[len(seen) // 2 + 1]
    text = q.shape[2] - 6 * 8  # ComfyUI fills the prompt up
    ref_k, ref_v = (x[:, :, text:].expand(2, -1, -1, -1) for x in seen[1][1:3])
    angles = -7 * 2000.0 ** (-torch.tensor([0, 2]).double() / 4)  # of the third axis, the columns
    columns = ref_k[..., 8:12]
    even, odd = columns[..., ::2], columns[..., 1::2]
    turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
    ref_k = torch.cat((ref_k[..., :8], torch.stack(turned, dim=-1).flatten(-2), ref_k[..., 12:]), dim=-1)
    keys, values = torch.cat((k[:, :, :text], ref_k), dim=2), torch.cat((v[:, :, :text], ref_v), dim=2)
    torch.testing.assert_close(out[:, :, text:], plain(q[:, :, text:], keys, values), atol=1e-5, rtol=1e-4)


def test_attention_given_in_containers_is_edited_alike(flux: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer ComfyUI lets a model hand over q, k and v in containers that are emptied on use, and unpacks them for an
    override that does not say that it takes containers."""
    import comfy.ldm.flux.math as flux_math

    class Container:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor: Tensor | None = tensor

        def take(self) -> Tensor:
            tensor, self.tensor = self.tensor, None
            assert tensor is not None, "taken twice"
            return tensor

    attention = flux_math.optimized_attention

    def newer(*args: Any, **kwargs: Any) -> Tensor:
        held = tuple(Container(x) for x in args[:3])
        override = kwargs["transformer_options"].get("optimized_attention_override")
        if override is None:
            return attention(*(one.take() for one in held), *args[3:], **kwargs)
        assert not hasattr(override, "container_function")
        tensors = tuple(one.take() for one in held)
        return override(attention, *tensors, *args[3:], _inside_attn_wrapper=True, **kwargs)

    patched = attach(flux.model, flux.both())
    expected = flux.sample(patched)
    BANK.clear()
    monkeypatch.setattr(flux_math, "optimized_attention", newer)
    assert torch.equal(flux.sample(patched), expected)
    assert torch.equal(flux.sample(flux.model), flux.plain)


def test_frames_that_newer_wan_models_are_given_in_context_come_last() -> None:
    """Their tokens stand after the video's, and are not mistaken for it."""
    model: Any = SimpleNamespace(patch_size=(1, 2, 2), ref_conv=None)
    conds = {"context_latents": [torch.zeros(1, 16, 1, 6, 8), torch.zeros(1, 16, 2, 4, 4)]}
    layout = FAMILIES["comfy.ldm.wan.model.WanModel"].layout(model, Sequences((1, 16, 3, 12, 16), 7, conds))
    assert (layout.before, layout.frames, layout.grid, layout.after) == (0, 3, (6, 8), 3 * 4 + 2 * 2 * 2)


# --- presets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "ctrl-x"])
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_every_preset_but_one_acts_where_the_familys_appearance_is(name: str, preset: str) -> None:
    """In steps at 0, 50 and almost 100 % of the schedule."""
    subject = Subject(name)
    patched = attach(subject.model, *PRESETS[preset].injections([B], A, transformer=True))
    output = subject.sample(patched, steps=3)
    assert change(output, subject.sample(subject.model, steps=3)) > VISIBLE
    report = last_report(patched)
    read = chosen(subject.model, "all" if preset == "style-aligned" else "appearance")
    everywhere = preset in ("default", "style-aligned")  # the default's shape
    assert set(report.chosen) == (set(subject.kind.sites) if everywhere else read)
    assert not report.silent
    assert read == {
        site for site in subject.kind.sites if preset == "style-aligned" or name == "sd3" or "single" in site
    }


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_shape_of_another_size_is_refused_where_its_places_are_turned_in(subject: Subject) -> None:
    patched = attach(subject.model, replace(reads(B), edit=AttentionEdit(shape_query=1.0), shape=B))
    if subject.name == "sd3":
        assert change(subject.sample(patched), subject.plain) > VISIBLE
        return
    told = r"video of 3 latent frames" if subject.name == "wan-video" else r"10 x 14 cells.*12 x 16.*resize"
    with pytest.raises(HostError, match=told):
        subject.sample(patched)


def test_what_a_transformer_cannot_do_is_refused(sd3: Subject) -> None:
    with pytest.raises(HostError, match=r"'normalise' \(Ctrl-X\).*choose 'replace' or 'extend'"):
        attach(sd3.model, reads(B, edit=AttentionEdit("normalise")))
    with pytest.raises(ValueError, match=r"'decoder' means no self-attention.*double\.0, .*allowed besides.*early"):
        attach(sd3.model, reads(B, sites="decoder"))
    with pytest.raises(HostError, match=r"4 latent channels.*works with 16"):
        attach(sd3.model, reads(Reference(random(1, 4, 8, 8, seed=8))))
    with pytest.raises(HostError, match=r"changed nothing.*Widen start and end percent"):
        sd3.sample(attach(sd3.model, reads(B, window=Window(1.0, 1.0))))


def test_an_unknown_family_is_refused_with_those_that_are_known() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.diffusion_model = nn.Linear(2, 2)

    cpu = torch.device("cpu")
    other = comfy.model_patcher.ModelPatcher(Strange(), load_device=cpu, offload_device=cpu)
    with pytest.raises(HostError) as error:
        attach(other, reads(B))
    words = ("Linear", "SDXL", "Flux", "Chroma", "SD3", "Qwen-Image", "Wan", "Lumina2", "Z-Image")
    assert all(word in str(error.value) for word in words)
