"""ComfyUI's latent models whose noisy latent is clean + sigma * noise (SD1.x, SD2.x, SDXL, the demo model): inversion
of references.

An inversion runs as a SAMPLER of ComfyUI's own guider, so that loading, offload, LoRA, ControlNet, previews and
interrupt work as in any sampling, and nothing is attached to the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor

from ..noise import Denoise, OnStep, Trajectory, ddim_inversion, ddpm_sample, edit_friendly_inversion
from ..reference import Reference
from .base import HostError, require_channels

Policy = Literal["ddim", "edit-friendly"]

SCHEDULER = "normal"
"""ComfyUI's name of the schedule that inversions follow: even in the model's training steps, up to its last."""
ITERATIONS = 3
"""Passes for each step of DDIM inversion. On the demo model 20 steps of 3 come back closer than 150 of 1 (error of the
latent 0.011 against 0.019 to 0.022), and start from noise nearer to the level it must have (0.97 against 0.9)."""


class Inversion(NamedTuple):
    """An inverted reference, and what a stock SamplerCustom takes, at cfg 1 and with add_noise off, to draw it again.

    Attributes:
        reference: with its trajectory, and with the conditioning it was inverted with.
        start: (1, C, h, w), the noisiest latent as a LATENT holds it: in the autoencoder's space.
        sampler: a SAMPLER: euler for `ddim`, DDPM with the inversion's noise maps for `edit-friendly`.
        sigmas: SIGMAS, the schedule of the inversion.
    """

    reference: Reference
    start: Tensor
    sampler: comfy.samplers.KSAMPLER
    sigmas: Tensor


def invert(
    model: comfy.model_patcher.ModelPatcher,
    reference: Reference,
    policy: Policy,
    steps: int,
    *,
    conditioning: Any = None,
    seed: int = 0,
    callback: OnStep | None = None,
) -> Inversion:
    """Invert a reference: for each step one pass of the model (edit-friendly) or `ITERATIONS` (DDIM).

    Args:
        model: with the noise of SD1.x, SD2.x or SDXL; patches on it take part, as in sampling.
        reference: of any size.
        policy: `noise.ddim_inversion` or `noise.edit_friendly_inversion`.
        steps: 1 or more, of the schedule from the clean latent to the model's highest noise level.
        conditioning: a CONDITIONING that describes the reference; None takes the reference's own.
        seed: of the levels' noise in edit-friendly inversion; DDIM has none.
        callback: ComfyUI's sampling callback, for progress and previews.

    Raises:
        HostError: the model has another kind of noise, the reference has another number of latent channels, or there
            is no conditioning.
    """
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.EPS):
        raise HostError(
            f"inversion works on models that add noise as SD1.x, SD2.x and SDXL do, but this model "
            f"({type(model.model).__name__}) adds it as {type(sampling).__mro__[1].__name__}: give the reference to "
            "the injection without inverting it"
        )
    require_channels(reference, model.model.latent_format.latent_channels, type(model.model).__name__)
    conditioning = reference.conditioning if conditioning is None else conditioning
    if conditioning is None:
        raise HostError(
            "an inversion needs to know what the picture shows: connect a conditioning (a CLIP Text Encode, which may "
            "be empty) here or at Encode Reference"
        )
    sigmas = comfy.samplers.calculate_sigmas(sampling, SCHEDULER, steps)
    sampler = _Inverter(policy, seed)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": conditioning})
    # ComfyUI wants noise for its shape; the inversion makes its own.
    noise = torch.zeros_like(reference.latent)
    start = guider.sample(noise, reference.latent, sampler, sigmas, callback=callback, disable_pbar=True, seed=seed)
    assert sampler.trajectory is not None
    inverted = replace(reference, conditioning=conditioning, trajectory=sampler.trajectory)
    again = comfy.samplers.sampler_object("euler")
    if sampler.noise_maps is not None:
        again = comfy.samplers.KSAMPLER(_Replay(sampler.trajectory.sigmas, sampler.noise_maps))
    return Inversion(inverted, start.to("cpu"), again, sigmas)


class _Inverter(comfy.samplers.Sampler):
    """Runs one inversion under a guider, which then holds what was found."""

    def __init__(self, policy: Policy, seed: int) -> None:
        self.policy: Policy = policy
        self.seed = seed
        self.trajectory: Trajectory | None = None
        self.noise_maps: Tensor | None = None

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict,
        callback: OnStep | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        denoise, clean = _denoiser(model_wrap, extra_args), latent_image.float()
        if self.policy == "ddim":
            self.trajectory = ddim_inversion(denoise, clean, sigmas, iterations=ITERATIONS, on_step=callback)
        else:
            self.trajectory, self.noise_maps = edit_friendly_inversion(
                denoise, clean, sigmas, self.seed, on_step=callback
            )
        return self.trajectory.start.to(clean)


@dataclass(frozen=True, eq=False)
class _Replay:
    """What k-diffusion calls a sampler: DDPM with the noise maps of an edit-friendly inversion."""

    sigmas: Tensor
    noise_maps: Tensor

    def __call__(
        self,
        model: Callable,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict,
        callback: Callable[[dict], None] | None,
        disable: bool,
    ) -> Tensor:
        if not torch.equal(sigmas.cpu(), self.sigmas):
            raise HostError(
                f"the noise maps of this inversion belong to its own {len(self.sigmas) - 1} steps, but the sampler was "
                f"given sigmas of {len(sigmas) - 1} steps: connect the sigmas of the same Invert Reference"
            )

        def on_step(step: int, clean: Tensor, noisy: Tensor, _: int) -> None:
            if callback is not None:
                callback({"i": step, "denoised": clean, "x": noisy})

        return ddpm_sample(_denoiser(model, extra_args), x, sigmas, self.noise_maps, on_step=on_step)


def _denoiser(model: Callable, extra_args: dict) -> Denoise:
    """A model of ComfyUI, wrapped for its samplers, as the core's denoiser."""
    return lambda x, sigma: model(x, x.new_full((x.shape[0],), sigma), **extra_args)
