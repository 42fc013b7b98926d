"""AdaIN Color Guidance under ComfyUI's own samplers, on a stand-in for a model of each family and on a real UNet."""

# ruff: noqa: E402
from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from demo.comfy import ensure_importable

ensure_importable()

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.sample
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

from demo.denoiser import build_denoiser
from inversion_core.attention import AttentionEdit
from inversion_core.hosts import comfy_color, comfy_guidance, comfy_unet
from inversion_core.hosts.base import HostError
from inversion_core.hosts.comfy_color import ColorGuidance, attach
from inversion_core.injection import Injection, Window
from inversion_core.reference import Reference

CPU = torch.device("cpu")
FAMILIES = {
    "SD1.5": (comfy.latent_formats.SD15, comfy.model_base.ModelType.EPS, (2, 4, 8, 10)),
    "SDXL": (comfy.latent_formats.SDXL, comfy.model_base.ModelType.V_PREDICTION, (1, 4, 8, 10)),
    "Flux": (comfy.latent_formats.Flux, comfy.model_base.ModelType.FLUX, (2, 16, 8, 10)),
    "SD3": (comfy.latent_formats.SD3, comfy.model_base.ModelType.FLOW, (1, 16, 8, 10)),
    "Wan": (comfy.latent_formats.Wan21, comfy.model_base.ModelType.FLOW, (1, 16, 3, 8, 10)),
}


@pytest.fixture(autouse=True)
def as_in_a_node() -> Any:
    with torch.inference_mode():
        yield


class Bland(nn.Module):
    """Stands in for any architecture: its prediction follows its input."""

    dtype = torch.float32

    def forward(self, x: Tensor, timesteps: Tensor, context: Any = None, **_: Any) -> Tensor:
        return x * 0.9


def model_of(family: str) -> Any:
    latent_format, kind, _ = FAMILIES[family]

    class Config(comfy.supported_models_base.BASE):
        unet_config: dict[str, Any] = {}
        unet_extra_config: dict[str, Any] = {}

    Config.latent_format = latent_format
    base = comfy.model_base.BaseModel(Config({"disable_unet_model_creation": True}), kind)
    base.diffusion_model = Bland()
    return comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference_for(channels: int, mask: Tensor | None = None) -> Reference:
    spread = torch.linspace(0.3, 1.5, channels).view(1, -1, 1, 1)
    return Reference(random(1, channels, 6, 14, seed=1) * spread + spread.flip(1), mask)


def sample(model: Any, shape: tuple[int, ...], **changes: Any) -> Tensor:
    extra = {key: changes.pop(key) for key in ("pooled_output",) if key in changes}
    conds = [[torch.zeros(1, 4, changes.pop("width", 8)), extra]]
    settings: dict[str, Any] = {"steps": 4, "cfg": 3.0, "denoise": 1.0, "latent": torch.zeros(shape), **changes}
    latent, steps, cfg = settings.pop("latent"), settings.pop("steps"), settings.pop("cfg")
    noise = random(*shape, seed=100)
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "normal", conds, conds, latent, disable_pbar=True, seed=0, **settings
    )


def moments(x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of (C, ...)."""
    flat = x.double().flatten(1)
    w = torch.ones(flat.shape[1]).double() if weight is None else weight.expand(x.shape[1:]).flatten().double()
    mean = (flat * w).sum(1) / w.sum()
    return mean, (((flat - mean[:, None]) ** 2 * w).sum(1) / w.sum()).sqrt()


EVERYWHERE = Window(0.0, 1.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_the_result_has_the_references_statistics(family: str, cfg: float) -> None:
    """The last step's prediction is the result. Compared as the VAE would decode it, after the model's own scaling."""
    shape = FAMILIES[family][2]
    reference = reference_for(shape[1])
    out = sample(attach(model_of(family), ColorGuidance(reference, window=EVERYWHERE)), shape, cfg=cfg)
    for row in out:
        for found, wanted in zip(moments(row), moments(reference.latent[0]), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)
    assert not torch.allclose(sample(model_of(family), shape, cfg=cfg), out, atol=0.1)


WIDTH, POOLED = 32, 24
DITS = {
    "Flux": (
        comfy.supported_models.Flux,
        {"image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": POOLED, "context_in_dim": WIDTH}
        | {"hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "theta": 10_000}
        | {"axes_dim": [4, 6, 6], "patch_size": 2, "qkv_bias": True, "guidance_embed": True},
        (2, 16, 8, 10),
    ),
    "SD3": (
        comfy.supported_models.SD3,
        {"in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": POOLED}
        | {"pos_embed_max_size": 16, "num_patches": 256, "pos_embed_scaling_factor": None, "context_size": WIDTH}
        | {
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": WIDTH, "out_features": 128},
            }
        },
        (2, 16, 8, 10),
    ),
    "Wan": (
        comfy.supported_models.WAN21_T2V,
        {"image_model": "wan2.1", "model_type": "t2v", "dim": 32, "ffn_dim": 32, "text_dim": WIDTH, "num_heads": 2}
        | {"num_layers": 1, "in_dim": 16, "out_dim": 16},
        (1, 16, 3, 8, 10),
    ),
}


@pytest.mark.parametrize("family", DITS)
def test_real_diffusion_transformers_are_matched_alike(family: str) -> None:
    """ComfyUI's own model classes, small and with random weights; matched in the left half."""
    kind, unet, shape = DITS[family]
    config = kind(unet)
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({})
    torch.manual_seed(0)
    # Buffers too: SD3's position embedding is one, and as a real checkpoint would fill it, it is not even zeroed.
    for values in (*base.diffusion_model.parameters(), *base.diffusion_model.buffers()):
        values.copy_(torch.randn_like(values) * 0.05)
    model = comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU)
    reference, half = reference_for(16), shape[-1] // 2
    mask = torch.zeros(1, 1, *shape[-2:])
    mask[..., :half] = 1
    guided = attach(model, ColorGuidance(reference, window=Window(0.5, 1.0), mask=mask))

    out, plain = (sample(one, shape, width=WIDTH, pooled_output=torch.zeros(1, POOLED)) for one in (guided, model))

    assert not torch.equal(out[..., half:], plain[..., half:])  # what the model makes of its matched neighbours
    for row in out:
        for found, wanted in zip(moments(row[..., :half]), moments(reference.latent[0]), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)


@pytest.mark.parametrize("family", ["SD1.5", "Flux", "Wan"])
def test_masks_on_both_sides(family: str) -> None:
    """Matched inside, bit for bit the model's own outside; the mask is given in pixels, the latent is 8x smaller."""
    shape = FAMILIES[family][2]
    mask_ref = torch.zeros(1, 1, 6, 14)
    mask_ref[..., :5] = 1
    reference = reference_for(shape[1], mask_ref)
    mask = torch.zeros(1, 1, shape[-2] * 8, shape[-1] * 8)
    mask[..., : shape[-1] * 4] = 1
    model = model_of(family)

    out = sample(attach(model, ColorGuidance(reference, window=EVERYWHERE, mask=mask)), shape)

    half = shape[-1] // 2
    assert torch.equal(out[..., half:], sample(model, shape)[..., half:])
    for found, wanted in zip(moments(out[0][..., :half]), moments(reference.latent[0], mask_ref[0, 0]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)


def test_a_video_is_matched_as_one() -> None:
    """One map for all frames: what frames differ by stays, up to the scale of each channel."""
    shape = FAMILIES["Wan"][2]
    latent = random(*shape, seed=3) + torch.arange(3).view(1, 1, 3, 1, 1)
    run = comfy_color._Run(ColorGuidance(reference_for(16), window=EVERYWHERE), model_of("Wan").model)
    out = run.guided(latent, torch.tensor([0.5]))
    means, means_out = latent.mean((3, 4)), out.mean((3, 4))
    ratio = (means_out[:, :, 2] - means_out[:, :, 0]) / (means[:, :, 2] - means[:, :, 0])
    scale = out.flatten(2).std(2) / latent.flatten(2).std(2)
    torch.testing.assert_close(ratio, scale, rtol=1e-3, atol=1e-3)


def test_inpainting_keeps_the_rest_and_measures_the_hole() -> None:
    shape = (1, 4, 8, 10)
    model, reference = model_of("SD1.5"), reference_for(4)
    picture = random(*shape, seed=7) + 5
    hole = torch.zeros(1, 1, 8, 10)
    hole[..., :4] = 1

    out = sample(attach(model, ColorGuidance(reference, window=EVERYWHERE)), shape, latent=picture, noise_mask=hole)

    torch.testing.assert_close(out[..., 4:], picture[..., 4:], rtol=0, atol=1e-3)
    for found, wanted in zip(moments(out[0][..., :4]), moments(reference.latent[0]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=5e-3)


@pytest.mark.parametrize("family", ["SD1.5", "Flux", "Wan"])
@pytest.mark.parametrize("dimensions", [2, 3, 4, 5])
def test_an_inpainting_mask_is_read_in_every_form_that_nodes_send(family: str, dimensions: int) -> None:
    """(H, W), (B, H, W), as of InpaintModelConditioning's kind, (B, 1, H, W) and (B, 1, frames, H, W)."""
    shape = FAMILIES[family][2]
    model, reference = model_of(family), reference_for(shape[1])
    if dimensions == 5 and len(shape) == 4:
        pytest.skip("a picture has no frames")
    hole = torch.zeros((1, 1, 1, 8, 10)[5 - dimensions :])
    hole[..., :4] = 1
    settings = {"latent": random(*shape, seed=7) + 5, "noise_mask": hole}

    out = sample(attach(model, ColorGuidance(reference, window=EVERYWHERE)), shape, **settings)

    for row in out:
        for found, wanted in zip(moments(row[..., :4]), moments(reference.latent[0]), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=5e-3)


def test_masks_of_a_batch_and_of_frames_are_told_apart() -> None:
    """By ComfyUI's own reading of the same masks, at the latents' own size."""
    masks = (random(3, 8, 10, seed=8) > 0).float()
    picture, video = torch.zeros(5, 4, 8, 10), torch.zeros(2, 16, 3, 8, 10)
    for given in (masks, masks[:, None]):
        theirs = comfy.utils.reshape_mask(given, picture.shape)
        assert torch.equal(comfy_guidance.fit_mask(given, picture), theirs[:, :1])
        theirs = comfy.utils.reshape_mask(given, video.shape)
        assert torch.equal(comfy_guidance.fit_mask(given, video).expand(2, -1, -1, -1, -1), theirs[:, :1])


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("grade", [0.0, 0.6])
def test_differential_diffusion_is_matched_as_far_as_its_mask_says(order: str, grade: float) -> None:
    """ComfyUI's own node, whose last step lets everything change: what the mask keeps must not take the colours."""
    shape = (1, 4, 8, 10)
    guidance = ColorGuidance(reference_for(4), window=EVERYWHERE)
    picture = random(*shape, seed=7) + 5
    change = torch.zeros(1, 1, 8, 10)
    change[..., :3], change[..., 3:6] = 1, grade

    def graded(model: Any) -> Any:
        return DifferentialDiffusion.execute(model).args[0]

    model = model_of("SD1.5")
    guided = attach(graded(model), guidance) if order == "before" else graded(attach(model, guidance))
    out, plain = (sample(one, shape, latent=picture, noise_mask=change) for one in (guided, graded(model)))

    assert torch.equal(out[..., 6:], plain[..., 6:])
    assert torch.equal(out[..., 3:6], plain[..., 3:6]) == (grade == 0)
    if grade == 0:
        for found, wanted in zip(moments(out[0][..., :3]), moments(guidance.reference.latent[0]), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=5e-3)


def test_strength_0_attaches_nothing() -> None:
    model = model_of("SD1.5")
    clone = attach(model, ColorGuidance(reference_for(4), strength=0))
    assert clone is not model
    assert clone.model_options == model.model_options and clone.wrappers == model.wrappers
    assert torch.equal(sample(clone, (1, 4, 8, 10)), sample(model, (1, 4, 8, 10)))


def test_the_model_put_in_stays_clean_and_runs_repeat() -> None:
    model, shape = model_of("SD1.5"), (1, 4, 8, 10)
    before, options = sample(model, shape), copy.deepcopy(model.model_options)
    guided = attach(model, ColorGuidance(reference_for(4)))
    first = sample(guided, shape)
    assert torch.equal(sample(guided.clone(), shape), first)
    assert not torch.equal(first, before)
    assert model.model_options == options and torch.equal(sample(model, shape), before)
    assert comfy_guidance.KEY not in guided.model_options["transformer_options"]


def test_another_number_of_channels_is_refused_by_name() -> None:
    with pytest.raises(HostError, match=r"16 latent channels, but this model \(BaseModel\) works with 4: encode"):
        attach(model_of("SD1.5"), ColorGuidance(reference_for(16)))


def test_a_run_that_misses_the_window_is_loud() -> None:
    guided = attach(model_of("SD1.5"), ColorGuidance(reference_for(4), window=Window(0.0, 0.1)))
    with pytest.raises(HostError, match="changed nothing: no step of this run lies between 0.0 and 0.1"):
        sample(guided, (1, 4, 8, 10), denoise=0.5)


def test_outside_of_a_guiders_run_it_says_so() -> None:
    hook = attach(model_of("SD1.5"), ColorGuidance(reference_for(4))).model_options["sampler_post_cfg_function"][0]
    with pytest.raises(HostError, match="outside of ComfyUI's sampling"):
        hook({"model_options": {}, "denoised": torch.zeros(1, 4, 8, 8), "sigma": torch.ones(1)})


def test_other_post_cfg_functions_run_in_their_order() -> None:
    """One before that would be matched away, one after whose shift shows in full; and a second guidance."""
    shape, reference = (1, 4, 8, 10), reference_for(4)
    guidance = ColorGuidance(reference, window=EVERYWHERE)

    def shifted(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_sampler_post_cfg_function(lambda args: args["denoised"] + 7 * 0.18215)
        return clone

    for build, shift in ((lambda m: attach(shifted(m), guidance), 0.0), (lambda m: shifted(attach(m, guidance)), 7.0)):
        mean, _ = moments(sample(build(model_of("SD1.5")), shape)[0])
        torch.testing.assert_close(mean, moments(reference.latent[0])[0] + shift, rtol=0, atol=5e-3)

    left = torch.zeros(1, 1, 8, 10)
    left[..., :5] = 1
    other = replace(reference_for(4), latent=reference.latent * 0.3 - 1)
    two = attach(model_of("SD1.5"), replace(guidance, mask=left))
    two = attach(two, ColorGuidance(other, window=EVERYWHERE, mask=1 - left))
    out = sample(two, shape)[0]
    torch.testing.assert_close(moments(out[..., :5])[0], moments(reference.latent[0])[0], rtol=0, atol=5e-3)
    torch.testing.assert_close(moments(out[..., 5:])[0], moments(other.latent[0])[0], rtol=0, atol=5e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ramp_follows_the_sampling_percent(family: str) -> None:
    sampling = model_of(family).model.model_sampling
    for percent in (0.1, 0.25, 0.5, 0.9):
        assert comfy_guidance.percent_of(sampling, float(sampling.percent_to_sigma(percent))) == pytest.approx(
            percent, abs=2e-3
        )
    rising = ColorGuidance(reference_for(4), strength=0.8, window=Window(0.2, 0.6), ramp="rising")
    assert [rising.strength_at(p) for p in (0.2, 0.4, 0.6)] == pytest.approx([0, 0.4, 0.8])
    assert [replace(rising, ramp="falling").strength_at(p) for p in (0.2, 0.3)] == pytest.approx([0.8, 0.6])
    assert replace(rising, ramp="constant").strength_at(0.3) == 0.8


def test_with_kv_injection_in_either_order_on_a_real_unet() -> None:
    torch.manual_seed(0)
    base = build_denoiser()
    for parameter in base.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.02)
    model = comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU)
    reference, shape = reference_for(4), (1, 4, 16, 16)
    injection = Injection(AttentionEdit(), appearance=(reference,))
    guidance = ColorGuidance(reference, window=EVERYWHERE)
    width = base.diffusion_model.output_blocks[0][1].transformer_blocks[0].attn2.to_k.in_features

    both = [
        sample(attach(comfy_unet.attach(model, injection), guidance), shape, width=width),
        sample(comfy_unet.attach(attach(model, guidance), injection), shape, width=width),
    ]

    assert torch.equal(*both)
    torch.testing.assert_close(moments(both[0][0])[0], moments(reference.latent[0])[0], rtol=0, atol=2e-3)
    assert not torch.equal(both[0], sample(attach(model, guidance), shape, width=width))


def test_settings_outside_of_what_is_allowed_are_refused() -> None:
    with pytest.raises(ValueError, match="strength is 1.5, allowed"):
        ColorGuidance(reference_for(4), strength=1.5)
    with pytest.raises(ValueError, match="output mask is empty"):
        ColorGuidance(reference_for(4), mask=torch.zeros(1, 1, 4, 4))
