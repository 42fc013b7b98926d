"""Injections in company: ComfyUI's own nodes and what popular packs hook in, in every order and split of rows.

Where a pack draws random numbers (token merging does), two runs are compared only where they draw the same.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import comfy.utils
import comfy_extras.nodes_differential_diffusion
import comfy_extras.nodes_freelunch
import comfy_extras.nodes_hypertile
import comfy_extras.nodes_pag
import comfy_extras.nodes_sag
import comfy_extras.nodes_tomesd
import pytest
import torch
from torch import Tensor, nn

from demo.train.data import reset
from inversion_core.attention import AttentionEdit
from inversion_core.correspondence import Correspondence, Matching
from inversion_core.features import Features
from inversion_core.hosts.comfy_unet import attach, last_report
from inversion_core.injection import Injection, Window
from inversion_core.presets import PRESETS
from inversion_core.reference import Reference

from .models import (
    NEGATIVE,
    NOISE,
    POSITIVE,
    Patcher,
    demo_patcher,
    passes,
    prompt,
    random,
    sample,
    sd15_patcher,
    with_low_memory,
)

VISIBLE = 1e-3
ROUNDING: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}
A, B = Reference(random(1, 4, 16, 16, seed=1)), Reference(random(1, 4, 12, 20, seed=2))
BOTH = Injection(AttentionEdit(shape_query=1.0), (B,), shape=A, sites="all")
LEFT = torch.cat((torch.ones(1, 1, 16, 8), torch.zeros(1, 1, 16, 8)), dim=3)
FINE = "output.3.0"


@pytest.fixture(scope="module")
def model() -> Patcher:
    return demo_patcher()


def change(a: Tensor, b: Tensor) -> float:
    assert torch.isfinite(a).all()
    return float((a - b).abs().max())


def hypertile(model: Patcher) -> Patcher:
    """The finest level in four tiles of 8x8."""
    return comfy_extras.nodes_hypertile.HyperTile.execute(model, 64, 1, 0, False)[0]


def tome(model: Patcher) -> Patcher:
    """The finest level with 30 % of its queries merged."""
    return comfy_extras.nodes_tomesd.TomePatchModel.execute(model, 0.3).result[0]


def freeu(model: Patcher) -> Patcher:
    return comfy_extras.nodes_freelunch.FreeU_V2().patch(model, 1.3, 1.4, 0.9, 0.2)[0]


def pag(model: Patcher) -> Patcher:
    return comfy_extras.nodes_pag.PerturbedAttentionGuidance.execute(model, 3.0).result[0]


class IPAdapter:
    """What such packs put at attn2: the layer's own attention and, beside it, one on the picture's tokens."""

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain

    def __deepcopy__(self, memo: dict) -> "IPAdapter":
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        width = q.shape[2]
        picture = torch.linspace(-1, 1, 4 * width).view(1, 4, width).expand(q.shape[0], -1, -1)
        return self.attention(q, k, v, extra) + self.gain * self.attention(q, picture, picture, extra)

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        q, k, v = (x.unflatten(2, (extra["n_heads"], -1)).transpose(1, 2) for x in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def ip_adapter(model: Patcher) -> Patcher:
    clone = model.clone()
    for block, number in (("input", 1), ("middle", 0), ("output", 1), ("output", 3)):
        clone.set_model_attn2_replace(IPAdapter(), block, number)
    return clone


def override(model: Patcher) -> Patcher:
    """Another attention kernel, as SageAttention packs install it; here one that is visibly not exact."""

    def attention(func: Callable, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return func(q, k, v * 0.9, *args, **kwargs)

    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = attention
    return clone


COMPANY: dict[str, Callable[[Patcher], Patcher]] = {
    "HyperTile": hypertile,
    "ToMe": tome,
    "FreeU": freeu,
    "PAG": pag,
    "IPAdapter": ip_adapter,
    "override": override,
}
TOKENS = random(1, 64, 8, seed=11)
LOOKS = Features((8, 8), TOKENS, TOKENS, TOKENS[:, None], None, None, None, "random")
MATCH = Correspondence(LOOKS, LOOKS, Matching())
INJECTIONS: dict[str, tuple[Injection, ...]] = {
    "both with masks": (replace(BOTH, shape=replace(A, mask=LEFT), mask=LEFT.transpose(2, 3)),),
    "shape keys": (
        replace(
            BOTH,
            edit=AttentionEdit("extend", shape_query=0.5, shape_key=1.0, qk_stats=True),
            feature_strength=0.5,  # at 1, nothing of what PAG does in the middle would get through
        ),
    ),
    "cross-image": tuple(
        replace(one, window=Window(), shape_window=Window()) for one in PRESETS["cross-image"].injections([B, A], A)
    ),
    "ctrl-x": PRESETS["ctrl-x"].injections([B], A, mask=LEFT),
    "matched": (
        replace(BOTH, edit=AttentionEdit("none", matched=0.7), matches=(MATCH,), mask=LEFT, feature_strength=0.5),
    ),
}


@pytest.mark.parametrize("injections", INJECTIONS)
@pytest.mark.parametrize("name", COMPANY)
def test_in_company_both_act_in_either_order_and_any_split(model: Patcher, name: str, injections: str) -> None:
    """Rows together or apart; attached before or after."""
    company, asked = COMPANY[name], INJECTIONS[injections]

    def run(patched: Patcher) -> Tensor:
        torch.manual_seed(5)  # of the merging
        return sample(patched, steps=1)

    ours, theirs = run(attach(model, *asked)), run(company(model))
    both = run(attach(company(model), *asked))
    assert change(both, ours) > VISIBLE
    assert change(both, theirs) > VISIBLE
    assert torch.equal(run(company(attach(model, *asked))), both)
    if name != "ToMe":  # it draws anew for every call
        torch.testing.assert_close(run(with_low_memory(attach(company(model), *asked))), both, **ROUNDING)


def test_a_mask_keeps_its_place_while_tokens_are_tiled(model: Patcher) -> None:
    """Each tile attends for itself; where nothing is edited it gives what HyperTile alone gives."""
    tiled = at_the_fine_site_only(hypertile, model)
    masked = at_the_fine_site(attach(tiled, Injection(AttentionEdit(), (B,), sites=FINE, mask=LEFT)))
    everywhere = at_the_fine_site(attach(tiled, Injection(AttentionEdit(), (B,), sites=FINE)))
    alone = at_the_fine_site(tiled)
    assert change(alone, at_the_fine_site(model)) > VISIBLE
    torch.testing.assert_close(masked[..., 8:], alone[..., 8:], **ROUNDING)
    torch.testing.assert_close(masked[..., :8], everywhere[..., :8], **ROUNDING)
    assert change(everywhere, alone) > VISIBLE


def test_the_whole_reference_is_read_by_every_tile(model: Patcher) -> None:
    """With the reference's keys alone, tiles do not matter: each query reads the same."""
    injection = Injection(AttentionEdit(), (B,), sites=FINE)
    tiled = at_the_fine_site(attach(at_the_fine_site_only(hypertile, model), injection))
    torch.testing.assert_close(tiled, at_the_fine_site(attach(model, injection)), **ROUNDING)


def test_shape_queries_keep_their_place_while_tokens_are_tiled(model: Patcher) -> None:
    injection = Injection(AttentionEdit(shape_query=0.7), (B,), sites=FINE, shape=A, feature_strength=0.0)
    tiled = at_the_fine_site(attach(at_the_fine_site_only(hypertile, model), injection))
    torch.testing.assert_close(tiled, at_the_fine_site(attach(model, injection)), **ROUNDING)


def test_masks_and_shape_queries_keep_their_place_while_tokens_are_merged(model: Patcher) -> None:
    """Of 256 queries, 76 go into some of 64: at least 116 have no part in it, and give what they give without."""
    injection = Injection(AttentionEdit(shape_query=0.7), (B,), sites=FINE, shape=A, feature_strength=0.0, mask=LEFT)
    torch.manual_seed(5)
    merged = at_the_fine_site(attach(at_the_fine_site_only(tome, model), injection))
    whole = at_the_fine_site(attach(model, injection))
    same = torch.isclose(merged, whole, **ROUNDING).all(dim=1)
    assert 116 / 256 <= float(same.float().mean()) < 1


def at_the_fine_site_only(company: Callable[[Patcher], Patcher], model: Patcher) -> Patcher:
    """With what the pack hooks into self-attention, but called at the fine site alone."""
    theirs = company(model).model_options["transformer_options"]["patches"]
    clone = model.clone()

    def enter(n: Tensor, context: Tensor, value: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
        here = extra["block"] == ("output", 3)
        return theirs["attn1_patch"][0](n, context, value, extra) if here else (n, context, value)

    def leave(n: Tensor, extra: dict) -> Tensor:
        return theirs["attn1_output_patch"][0](n, extra) if extra["block"] == ("output", 3) else n

    clone.set_model_attn1_patch(enter)
    clone.set_model_attn1_output_patch(leave)
    return clone


def at_the_fine_site(model: Patcher) -> Tensor:
    """What the fine site gives in the first step, as maps (rows, C, 16, 16); nothing before it is edited."""
    found: list[Tensor] = []

    def record(n: Tensor, extra: dict) -> Tensor:
        if extra["block"] == ("output", 3):
            found.append(n.clone())
        return n

    clone = model.clone()
    clone.set_model_attn1_output_patch(record)
    sample(clone, steps=1)
    (only,) = found
    return only.transpose(1, 2).unflatten(2, (16, 16))


def test_the_perturbed_attention_of_pag_is_left_to_it(model: Patcher) -> None:
    """Its middle block passes the values through: with other keys and values than its own that would mean nothing."""
    injection = Injection(AttentionEdit(), (B,), sites="middle")
    patched = attach(pag(model), injection)
    sample(patched, steps=2)
    assert last_report(patched).calls == {"middle.0.0": 2}
    assert last_report(patched).rows == 2 * 3


def test_self_attention_guidance_works_beside_us(model: Patcher) -> None:
    """It reads the middle block's attention of the picture, and evaluates the negative prompt once more by itself."""
    sag = comfy_extras.nodes_sag.SelfAttentionGuidance().execute(model, 0.8, 2.0).result[0]
    patched = attach(sag, replace(BOTH, sites="decoder", rows="positive"))
    assert (
        change(
            sample(patched, steps=2), sample(attach(model, replace(BOTH, sites="decoder", rows="positive")), steps=2)
        )
        > VISIBLE
    )
    assert last_report(patched).calls["output.3.0"] == 2


class Reversed(comfy.samplers.CFGGuider):
    """The order of the prompts is the guider's affair: ComfyUI's dual guider puts the negative one first."""

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None) -> Tensor:
        negative, positive = comfy.samplers.calc_cond_batch(
            self.inner_model, [self.conds["negative"], self.conds["positive"]], x, timestep, model_options
        )
        return negative + (positive - negative) * self.cfg


def test_positive_rows_are_known_by_their_prompt(model: Patcher) -> None:
    patched = attach(model, replace(BOTH, rows="positive"))
    outputs = []
    for kind in (comfy.samplers.CFGGuider, Reversed):
        guider = kind(patched)
        guider.set_conds(POSITIVE, NEGATIVE)
        guider.set_cfg(3.0)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 2)
        sampler = comfy.samplers.sampler_object("euler")
        outputs.append(guider.sample(NOISE[:1], torch.zeros(1, 4, 16, 16), sampler, sigmas, disable_pbar=True))
    torch.testing.assert_close(*outputs, **ROUNDING)


# --- pictures that are partly given -----------------------------------------------------------------------------------


@pytest.mark.parametrize("differential", [False, True], ids=["inpainting", "differential diffusion"])
def test_outside_the_noise_mask_the_picture_stays(model: Patcher, differential: bool) -> None:
    prepared = model
    if differential:
        prepared = comfy_extras.nodes_differential_diffusion.DifferentialDiffusion.execute(model).result[0]
    picture = random(1, 4, 16, 16, seed=33)
    mask = torch.linspace(0, 1, 16).expand(1, 16, 16).clone() if differential else (LEFT[0] > 0).float()
    outputs = [
        comfy.sample.sample(
            one,
            NOISE[:1],
            3,
            3.0,
            "euler",
            "normal",
            POSITIVE,
            NEGATIVE,
            picture,
            noise_mask=mask,
            disable_pbar=True,
            seed=0,
        )
        for one in (prepared, attach(prepared, BOTH), with_low_memory(attach(prepared, BOTH)))
    ]
    kept = mask[0] == 0
    assert change(outputs[1][..., ~kept], outputs[0][..., ~kept]) > VISIBLE
    if not differential:  # that lets everything change in the last step
        torch.testing.assert_close(outputs[1][..., kept], picture[..., kept], **ROUNDING)
    torch.testing.assert_close(outputs[1], outputs[2], **ROUNDING)


REGIONS = {
    "areas": prompt(101, area=(8, 16, 0, 0)) + prompt(103, area=(8, 16, 8, 0), strength=0.7),
    "odd areas": prompt(101, area=(7, 9, 3, 5)) + prompt(103),
    "masks": prompt(101, mask=LEFT[0], mask_strength=1.0) + prompt(103, mask=1 - LEFT[0], mask_strength=1.0),
    "times": prompt(101, start_percent=0.0, end_percent=0.5) + prompt(103, start_percent=0.5, end_percent=1.0),
    "lengths": [[random(1, 77, 128, seed=105), {}], *prompt(103)],
}


@pytest.mark.parametrize(("rows", "cfg"), [("all", 3.0), ("positive", 3.0), ("positive", 1.0)])
@pytest.mark.parametrize("name", REGIONS)
def test_regional_prompts_in_any_split(model: Patcher, name: str, cfg: float, rows: Any) -> None:
    injection = replace(BOTH, rows=rows, mask=LEFT)
    asked: Any = {"positive": REGIONS[name], "cfg": cfg, "noise": NOISE[:2], "steps": 2}
    joint = sample(attach(model, injection), **asked)
    torch.testing.assert_close(joint, sample(with_low_memory(attach(model, injection)), **asked), **ROUNDING)
    assert change(joint, sample(model, **asked)) > VISIBLE


# --- weights and side networks ----------------------------------------------------------------------------------------


def test_fp8_weights_are_their_values(model: Patcher) -> None:
    """The layers' own projections are called, so that 8-bit weights give what their values give in 32 bits."""
    family: Any = comfy.supported_models.SD15
    shape: dict[str, Any] = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "context_dim": 128,
        "use_spatial_transformer": True,
        "use_temporal_attention": False,
        "legacy": False,
        "channel_mult": [1, 2],
        "num_res_blocks": [1, 1],
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
    }
    outputs: dict[torch.dtype, list[Tensor]] = {}
    weights: dict[str, Tensor] = {}
    for dtype in (torch.float32, torch.float8_e4m3fn):
        config = family(dict(shape))
        config.set_inference_dtype(dtype, torch.float32)
        base = config.get_model({})
        if not weights:
            torch.manual_seed(0)
            reset(base.diffusion_model)
            weights = {k: v.to(torch.float8_e4m3fn) for k, v in base.diffusion_model.state_dict().items()}
        base.diffusion_model.load_state_dict({k: v.to(dtype) for k, v in weights.items()})
        assert {p.dtype for p in base.diffusion_model.parameters()} == {dtype}
        cpu = torch.device("cpu")
        patcher = comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)
        patched = [
            attach(patcher, *PRESETS[name].injections([B], A)) for name in ("default", "style-aligned", "ctrl-x")
        ]
        outputs[dtype] = [sample(one, steps=2) for one in (patcher, *patched)]
    for exact, small in zip(*outputs.values(), strict=True):
        torch.testing.assert_close(small, exact, **ROUNDING)
    assert all(change(one, outputs[torch.float32][0]) > VISIBLE for one in outputs[torch.float32][1:])


@pytest.fixture(scope="module")
def sd15() -> Patcher:
    return sd15_patcher()


def control_net(sd15: Patcher) -> Any:
    """A ControlNet of the model's shape with random weights, that says nothing of the reference."""
    net = comfy.cldm.cldm.ControlNet(
        image_size=32,
        in_channels=4,
        model_channels=32,
        hint_channels=3,
        num_res_blocks=[2, 2, 2, 2],
        channel_mult=[1, 2, 2, 2],
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_middle=1,
        context_dim=128,
        num_heads=8,
        use_spatial_transformer=True,
    )
    torch.manual_seed(1)
    reset(net)
    control = comfy.controlnet.ControlNet(net, load_device=torch.device("cpu"))
    return control.set_cond_hint(random(1, 3, 128, 128, seed=20).sigmoid(), 1.0)


@pytest.mark.parametrize("on_negative", [True, False], ids=["on both", "on the positive"])
def test_a_control_net_steers_the_picture_and_not_the_references(sd15: Patcher, on_negative: bool) -> None:
    control = {"control": control_net(sd15), "control_apply_to_uncond": False}
    asked: Any = {"positive": prompt(101, **control), "negative": prompt(102, **(control if on_negative else {}))}
    patched = attach(sd15, replace(BOTH, sites="decoder"))
    without = sample(patched, steps=1)
    rows = last_report(patched).reference_rows
    controlled = sample(patched, steps=1, **asked)
    assert change(controlled, without) > VISIBLE
    assert last_report(patched).reference_rows == 0 < rows  # what the bank holds is the same with and without it
    assert change(controlled, sample(sd15, steps=1, **asked)) > VISIBLE
    torch.testing.assert_close(sample(with_low_memory(patched), steps=1, **asked), controlled, atol=VISIBLE / 2, rtol=0)


def test_a_cross_attention_in_the_place_of_a_self_attention_is_no_site() -> None:
    """Some families' outer blocks read the prompt twice (SD x4 upscaler)."""
    model = demo_patcher()
    assert "output.3.0" in last_chosen(model)
    for block in model.model.diffusion_model.output_blocks[3][1].transformer_blocks:
        block.disable_self_attn = True
        block.attn1 = block.attn2
    assert "output.3.0" not in last_chosen(model)


def last_chosen(model: Patcher) -> list[str]:
    patched = attach(model, BOTH)
    with passes(model) as seen:
        sample(patched, steps=1)
    assert seen
    return list(last_report(patched).calls)
