"""Any of ComfyUI's latent models: the predicted clean latent takes the reference's colours while sampling.

A clone of the ModelPatcher carries a post-cfg function, in its place among those of other nodes, and an OUTER_SAMPLE
wrapper that gives each run its own record. Nothing is attached to the shared model, and what a run learns dies with it.
The architecture of the model plays no part, for only its prediction is changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import comfy.model_patcher
import comfy.patcher_extension
import torch
import torch.nn.functional as F
from torch import Tensor

from ..injection import Window
from ..reference import Reference
from ..statistics import Method, Samples, fit_transport, samples
from .base import HostError, inside, require_channels

KEY = "shape_and_appearance_color"
LATENT_EPS = 1e-3
"""Smallest standard deviation of a latent channel; latents have about unit scale."""

Ramp = Literal["constant", "rising", "falling"]


@dataclass(frozen=True, eq=False)
class ColorGuidance:
    """What of a reference's colours a prediction takes, where and when.

    Attributes:
        reference: its latent, and its mask, are what is matched to.
        method: see `statistics.fit_transport`.
        strength: 0 to 1, at its largest.
        window: when, in sampling percent.
        ramp: strength over the window: the same throughout, rising from 0, or falling to 0.
        mask: (1, 1, H, W) in [0, 1], where the output is measured and changed; any size; None: everywhere.
        required: whether a run in which no step lies in the window is an error. Not so where the window is a preset's:
            with few steps none may lie in a narrow one.
    """

    reference: Reference
    method: Method = "adain"
    strength: float = 1.0
    window: Window = field(default_factory=lambda: Window(0.2, 0.95))
    ramp: Ramp = "constant"
    mask: Tensor | None = None
    required: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength is {self.strength}, allowed is 0 (unchanged) to 1 (fully matched)")
        if self.mask is not None and not bool((self.mask > 0).any()):
            raise ValueError("the output mask is empty: nothing would be matched. Paint it or disconnect it")

    def __deepcopy__(self, memo: dict) -> ColorGuidance:
        return self  # immutable: hosts that copy their options may share it

    def strength_at(self, percent: float) -> float:
        """The strength at a place of the schedule inside the window."""
        if self.ramp == "constant" or self.window.end == self.window.start:
            return self.strength
        share = (percent - self.window.start) / (self.window.end - self.window.start)
        share = min(max(share, 0.0), 1.0)
        return self.strength * (share if self.ramp == "rising" else 1 - share)


def attach(model: comfy.model_patcher.ModelPatcher, guidance: ColorGuidance) -> comfy.model_patcher.ModelPatcher:
    """A clone of the model with one more guidance; the model itself is not touched. Strength 0 attaches nothing.

    Raises:
        HostError: the reference has another number of latent channels than the model.
    """
    require_channels(guidance.reference, model.model.latent_format.latent_channels, type(model.model).__name__)
    clone = model.clone()
    if guidance.strength == 0:
        return clone
    hook = _Hook(guidance)
    clone.set_model_sampler_post_cfg_function(hook)
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY, _OuterSample(hook))
    return clone


@dataclass(frozen=True, eq=False)
class _OuterSample:
    """Opens the record of a run for one hook, and sees at the end that the hook did something."""

    hook: _Hook

    def __deepcopy__(self, memo: dict) -> _OuterSample:
        return self

    def __call__(
        self, executor: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        guider = executor.class_obj
        keep = args[0] if args else kwargs.get("denoise_mask")
        graded = guider.model_options.get("denoise_mask_function") is not None
        run = _Run(self.hook.guidance, guider.model_patcher.model, keep, graded)
        options = guider.model_options.setdefault("transformer_options", {})
        options[KEY] = {**options.get(KEY, {}), self.hook: run}
        result = executor(noise, latent, sampler, sigmas, *args, **kwargs)
        run.require_effect()
        return result


@dataclass(frozen=True, eq=False)
class _Hook:
    """The post-cfg function an attached model carries. Immutable: what changes lives in the run's record."""

    guidance: ColorGuidance

    def __deepcopy__(self, memo: dict) -> _Hook:
        return self

    def __call__(self, args: dict[str, Any]) -> Tensor:
        run = args["model_options"].get("transformer_options", {}).get(KEY, {}).get(self)
        if run is None:
            raise HostError(
                "AdaIN Color Guidance was called outside of ComfyUI's sampling (its OUTER_SAMPLE wrapper did not run): "
                "sample with a node that goes through ComfyUI's guider, such as KSampler or SamplerCustom"
            )
        return run.matched(args["denoised"], args["sigma"])


@dataclass
class _Run:
    """One guidance in one sampling run.

    Attributes:
        base: the model's BaseModel.
        keep: the inpainting mask, 1 where the picture may change; None without one.
        graded: whether a node like Differential Diffusion decides anew at every step what the mask keeps.
    """

    guidance: ColorGuidance
    base: Any
    keep: Tensor | None = None
    graded: bool = False
    steps: int = 0
    _target: Samples | None = None
    _weight: Tensor | None = None

    def matched(self, denoised: Tensor, sigma: Tensor) -> Tensor:
        """The predicted clean latent (B, C, ...positions), matched if the step lies inside the window."""
        level, sampling = float(sigma.flatten()[0]), self.base.model_sampling
        if not inside(sampling, self.guidance.window, level):
            return denoised
        strength = self.guidance.strength_at(_percent(sampling, level))
        if strength == 0:
            return denoised
        where, measured = self.masks(denoised)
        target = self.target(denoised.device)
        rows, fitted = [], 0
        for i, row in enumerate(denoised.float()):
            weight = None if measured is None else measured[min(i, measured.shape[0] - 1)].expand(row.shape[1:])
            if weight is not None and not bool((weight > 0).any()):
                rows.append(row)
                continue
            transport = fit_transport(self.guidance.method, samples(row, weight), target, eps=LATENT_EPS)
            rows.append(transport(row))
            fitted += 1
        self.steps += fitted > 0
        after = torch.stack(rows).to(denoised.dtype)
        if where is None:
            return torch.lerp(denoised, after, strength)
        share = (where * strength).to(denoised)
        return torch.where(share > 0, torch.lerp(denoised, after, share), denoised)

    def masks(self, denoised: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Where the prediction is changed, and with what weight it is measured: (B or 1, 1, ...), (B or 1, ...).

        What an inpainting mask keeps is not measured: the picture around a hole says nothing of the colours in it.
        ComfyUI puts it back after this, so here it may be changed like the rest. Not so under Differential Diffusion,
        whose last step keeps nothing: there the mask says how far a place is changed.
        """
        where = None if self.guidance.mask is None else _fit(self.guidance.mask, denoised)
        keep = None if self.keep is None else _fit(self.keep, denoised)
        if keep is None:
            return where, None if where is None else where[:, 0]
        both = keep if where is None else keep * where
        return both if self.graded else where, both[:, 0]

    def target(self, device: torch.device) -> Samples:
        """The reference's latent as the model has it, once a run."""
        if self._target is None:
            latent = self.guidance.reference.latent.float()
            if getattr(self.base.latent_format, "latent_dimensions", 2) == 3:
                latent = latent.unsqueeze(2)  # video models scale (B, C, T, H, W)
            latent = self.base.process_latent_in(latent)[0]
            mask = self.guidance.reference.mask
            weight = None if mask is None else mask[0, 0].expand(latent.shape[1:])
            found = samples(latent, weight)
            self._target = Samples(found.values.to(device), found.weight.to(device))
        return self._target

    def require_effect(self) -> None:
        """Raise if no step of the run was matched."""
        if self.steps == 0 and self.guidance.required:
            window = self.guidance.window
            raise HostError(
                f"AdaIN Color Guidance changed nothing: no step of this run lies between {window.start} and "
                f"{window.end} of the schedule, or its mask and the inpainting mask have nothing in common. Widen "
                "start and end percent, check that the sampler's denoise reaches that part, or move the mask"
            )


def _fit(mask: Tensor, like: Tensor) -> Tensor:
    """A mask (B or 1, C or 1, ..., H, W) at the size of latents (B, C, ..., h, w), one channel, all frames alike
    unless the mask has as many."""
    flat = mask.to(like.device, torch.float32)
    flat = flat[:, :1]
    if flat.ndim == 5 and like.ndim == 5 and flat.shape[2] == like.shape[2]:
        if flat.shape[-2:] == like.shape[-2:]:
            return flat
        frames = F.interpolate(flat.transpose(1, 2).flatten(0, 1), size=like.shape[-2:], mode="area")
        return frames.unflatten(0, (-1, like.shape[2])).transpose(1, 2)
    if flat.ndim == 5:
        flat = flat[:, :, 0]
    fitted = flat if flat.shape[-2:] == like.shape[-2:] else F.interpolate(flat, size=like.shape[-2:], mode="area")
    return fitted if like.ndim == 4 else fitted.unsqueeze(2)


def _percent(sampling: Any, sigma: float) -> float:
    """Where in the schedule a noise level lies, by halving: the inverse of ComfyUI's `percent_to_sigma`."""
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        if float(sampling.percent_to_sigma(middle)) > sigma:
            low = middle
        else:
            high = middle
    return (low + high) / 2
