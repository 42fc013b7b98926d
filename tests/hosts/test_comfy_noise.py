"""Inversion of references through ComfyUI's samplers: on small random models, and on the demo model's pictures."""

from dataclasses import replace
from typing import Any, NamedTuple

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.supported_models_base
import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor, nn

from demo import world
from demo.generate import encode_prompts
from demo.model import DemoModel, load_demo_model
from inversion_core.hosts.base import HostError
from inversion_core.hosts.comfy_noise import ITERATIONS, Inversion, Policy, invert
from inversion_core.noise import ddim_inversion
from inversion_core.reference import Reference

from .models import (
    NEGATIVE,
    POOLED,
    POSITIVE,
    Patcher,
    demo_patcher,
    prompt,
    random,
    sample,
    sd15_patcher,
    sdxl_patcher,
)

POLICIES: tuple[Policy, ...] = ("ddim", "edit-friendly")
MODELS = {"demo": demo_patcher, "SD1.5": sd15_patcher, "SDXL": sdxl_patcher}
WIDE = Reference(random(1, 4, 12, 20, seed=2), conditioning=POSITIVE, noise_seed=5)
"""Of another size and aspect than any result."""


@pytest.fixture(scope="module")
def model() -> Patcher:
    return demo_patcher()


def redrawn(model: Patcher, found: Inversion, *, cfg: float = 1.0, start: Tensor | None = None) -> Tensor:
    """What the stock SamplerCustom gives without adding noise: (1, C, h, w) in the autoencoder's space."""
    start = found.start if start is None else start
    conds = found.reference.conditioning
    nothing = torch.zeros_like(start)
    return comfy.sample.sample_custom(
        model, nothing, cfg, found.sampler, found.sigmas, conds, conds, start, disable_pbar=True, seed=0
    )


def trajectory_of(found: Inversion) -> Any:
    assert found.reference.trajectory is not None
    return found.reference.trajectory


# --- on random weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_edit_friendly_gives_the_latent_back(name: str) -> None:
    """Whatever the model predicts: through the guider, in the autoencoder's space, to rounding."""
    model = MODELS[name]()
    conditioning = prompt(7, pooled_output=random(1, POOLED, seed=8)) if name == "SDXL" else POSITIVE
    found = invert(model, WIDE, "edit-friendly", 6, conditioning=conditioning)
    torch.testing.assert_close(redrawn(model, found), WIDE.latent, rtol=0, atol=2e-3)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_the_trajectory_lies_in_the_models_space_and_the_start_in_the_autoencoders(name: str, policy: Policy) -> None:
    model = MODELS[name]()
    conditioning = prompt(7, pooled_output=random(1, POOLED, seed=8)) if name == "SDXL" else POSITIVE
    found = invert(model, WIDE, policy, 4, conditioning=conditioning)
    trajectory, sampling = trajectory_of(found), model.model.model_sampling
    torch.testing.assert_close(trajectory.clean, model.model.process_latent_in(WIDE.latent))
    torch.testing.assert_close(model.model.process_latent_in(found.start), trajectory.start)
    assert trajectory.start.shape == found.start.shape == WIDE.latent.shape
    assert float(trajectory.sigmas[0]) == pytest.approx(float(sampling.sigma_max))
    assert torch.equal(trajectory.sigmas, found.sigmas)


def test_ddim_asks_the_model_with_the_references_conditioning_alone(model: Patcher) -> None:
    """The core's inversion with a denoiser written for the test: a plain call of the model."""
    context = POSITIVE[0][0]

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return model.model.apply_model(x, torch.full((1,), sigma), c_crossattn=context)

    found = invert(model, WIDE, "ddim", 5)
    expected = ddim_inversion(denoise, model.model.process_latent_in(WIDE.latent), found.sigmas, iterations=ITERATIONS)
    torch.testing.assert_close(trajectory_of(found).latents, expected.latents, rtol=1e-4, atol=1e-4)


def test_ddim_comes_back_through_the_stock_ksampler(model: Patcher) -> None:
    """The sampler and sigmas that are put out are KSampler's own euler and normal."""
    found = invert(model, WIDE, "ddim", 5)
    by_ksampler = comfy.sample.sample(
        model,
        torch.zeros_like(found.start),
        5,
        1.0,
        "euler",
        "normal",
        POSITIVE,
        NEGATIVE,
        found.start,
        disable_pbar=True,
        seed=0,
    )
    assert torch.equal(by_ksampler, redrawn(model, found))


def test_patches_on_the_model_take_part(model: Patcher) -> None:
    """Here a LoRA-like change of a weight, which ComfyUI applies when it loads the model for sampling."""
    key = "diffusion_model.input_blocks.0.0.weight"
    weight = model.model.state_dict()[key]
    patched = model.clone()
    patched.add_patches({key: (torch.full_like(weight, 0.5),)})
    plain, changed = (trajectory_of(invert(one, WIDE, "ddim", 4)).latents for one in (model, patched))
    assert not torch.allclose(plain, changed, atol=1e-2)


def test_the_conditioning_put_in_goes_before_the_references_own_and_stays_with_it(model: Patcher) -> None:
    other = prompt(103)
    found = invert(model, WIDE, "ddim", 3, conditioning=other)
    same = invert(model, replace(WIDE, conditioning=other), "ddim", 3)
    assert found.reference.conditioning is other
    assert found.reference.content == same.reference.content
    assert found.reference.content != invert(model, WIDE, "ddim", 3).reference.content


def test_mask_latent_and_seed_of_the_reference_stay(model: Patcher) -> None:
    mask = torch.ones(1, 1, 12, 20)
    found = invert(model, replace(WIDE, mask=mask), "ddim", 3).reference
    assert found.latent is WIDE.latent
    assert found.mask is mask
    assert torch.equal(found.noise(), WIDE.noise())


def test_the_seed_is_edit_friendlys_alone(model: Patcher) -> None:
    def content(policy: Policy, seed: int) -> str:
        return invert(model, WIDE, policy, 3, seed=seed).reference.content

    assert content("ddim", 1) == content("ddim", 2)
    assert content("edit-friendly", 1) == content("edit-friendly", 1) != content("edit-friendly", 2)


def test_noise_maps_refuse_the_sigmas_of_another_inversion(model: Patcher) -> None:
    found, other = (invert(model, WIDE, "edit-friendly", steps) for steps in (3, 4))
    with pytest.raises(HostError, match=r"own 3 steps.*sigmas of 4 steps.*same Invert Reference"):
        redrawn(model, found._replace(sigmas=other.sigmas))
    with pytest.raises(ValueError, match="noise maps are"):
        redrawn(model, found, start=torch.zeros(1, 4, 16, 16))


def traces(patcher: Patcher) -> Any:
    """What a run could leave on a ModelPatcher, comparable with ==."""
    names = ("model_options", "patches", "object_patches", "wrappers", "callbacks", "injections", "hook_patches")
    hooks = [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in patcher.model.named_modules()]
    return {name: repr(getattr(patcher, name)) for name in names}, hooks


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("interrupted", [False, True])
def test_nothing_remains_on_the_model(model: Patcher, policy: Policy, interrupted: bool) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(step: int, *_: Any) -> None:
        if step == 1:
            raise Interrupted

    before, drawn = traces(model), sample(model)
    weights = {name: value.clone() for name, value in model.model.state_dict().items()}
    if interrupted:
        with pytest.raises(Interrupted):
            invert(model, WIDE, policy, 4, callback=interrupt)
    else:
        invert(model, WIDE, policy, 4)
    assert traces(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.model.state_dict().items())
    assert torch.equal(sample(model), drawn)


@pytest.mark.parametrize("policy", POLICIES)
def test_inverting_and_drawing_again_report_their_steps(model: Patcher, policy: Policy) -> None:
    seen: list[tuple[int, tuple[int, ...], int]] = []

    def callback(step: int, clean: Tensor, noisy: Tensor, steps: int) -> None:
        assert noisy.shape == clean.shape
        seen.append((step, tuple(clean.shape), steps))

    expected = [(step, tuple(WIDE.latent.shape), 4) for step in range(4)]
    found = invert(model, WIDE, policy, 4, callback=callback)
    assert seen == expected
    seen.clear()
    nothing = torch.zeros_like(found.start)
    comfy.sample.sample_custom(
        model, nothing, 1.0, found.sampler, found.sigmas, POSITIVE, NEGATIVE, found.start, callback=callback, seed=0
    )
    assert seen == expected


# --- errors -----------------------------------------------------------------------------------------------------------


def test_without_a_conditioning_it_says_where_to_connect_one(model: Patcher) -> None:
    with pytest.raises(HostError, match="connect a conditioning .* at Encode Reference"):
        invert(model, replace(WIDE, conditioning=None), "ddim", 3)


def test_latents_of_another_family_are_refused(model: Patcher) -> None:
    flux = Reference(random(1, 16, 12, 20, seed=1), conditioning=POSITIVE)
    with pytest.raises(HostError, match="16 latent channels.*works with 4"):
        invert(model, flux, "ddim", 3)


def test_models_of_flow_matching_are_refused() -> None:
    class Config(comfy.supported_models_base.BASE):
        unet_config: dict[str, Any] = {}  # noqa: RUF012
        unet_extra_config: dict[str, Any] = {}  # noqa: RUF012
        latent_format = comfy.latent_formats.SD3

    base = comfy.model_base.BaseModel(Config({"disable_unet_model_creation": True}), comfy.model_base.ModelType.FLOW)
    base.diffusion_model = nn.Identity()
    flow = comfy.model_patcher.ModelPatcher(base, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))
    with pytest.raises(HostError, match="SD1.x, SD2.x and SDXL.*BaseModel.*without inverting"):
        invert(flow, WIDE, "ddim", 3)


# --- on the demo model's pictures -------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A render that no training has seen."""

    pixels: np.ndarray
    reference: Reference


@pytest.fixture(scope="module")
def demo() -> DemoModel:
    with torch.inference_mode():
        return load_demo_model()


@pytest.fixture(scope="module")
def pictures(demo: DemoModel) -> list[Picture]:
    found = []
    with torch.inference_mode():
        for seed in (500, 501):
            factors = world.sample(seed)
            pixels = world.render(factors).image
            latent = demo.vae.encode(torch.from_numpy(pixels)[None]).float()
            conditioning = encode_prompts(demo, [world.prompt(factors)])
            found.append(Picture(pixels, Reference(latent, conditioning=conditioning)))
    return found


def psnr(demo: DemoModel, latent: Tensor, picture: Picture) -> float:
    """Decibels of a latent's decoded picture against the render."""
    decoded = demo.vae.decode(latent)[0].numpy()
    return float(peak_signal_noise_ratio(picture.pixels, decoded, data_range=1.0))


def test_edit_friendly_gives_the_picture_as_the_autoencoder_does(demo: DemoModel, pictures: list[Picture]) -> None:
    """Nothing is lost but what the autoencoder loses: the same decibels, to a hundredth."""
    for picture in pictures:
        found = invert(demo.model, picture.reference, "edit-friendly", 20)
        own = psnr(demo, picture.reference.latent, picture)
        assert psnr(demo, redrawn(demo.model, found), picture) == pytest.approx(own, abs=0.01)


def test_ddim_gives_the_picture_back_where_fixed_noise_gives_another(demo: DemoModel, pictures: list[Picture]) -> None:
    """From forward noise at the highest level the model draws another picture of the same prompt; what is inverted must
    be nearer by 6 dB, half the error, and lose less than the autoencoder itself does: 3 dB would be as much again. The
    noise it starts from has the level the model was trained on, to four deviations of the spread of 1024 values."""
    for picture in pictures:
        found = invert(demo.model, picture.reference, "ddim", 50)
        inverted = psnr(demo, redrawn(demo.model, found), picture)
        assert inverted > psnr(demo, picture.reference.latent, picture) - 3

        forward = picture.reference.latent + float(found.sigmas[0]) * picture.reference.noise()
        assert inverted > psnr(demo, redrawn(demo.model, found, start=forward), picture) + 6

        noise = trajectory_of(found).noise_at(float(found.sigmas[0]))
        assert float(noise.std()) == pytest.approx(1, abs=4 / (2 * noise.numel()) ** 0.5)
