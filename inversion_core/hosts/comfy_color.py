"""Any of ComfyUI's latent models: the predicted clean latent takes the reference's colours while sampling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import comfy.model_patcher
import torch
from torch import Tensor

from ..injection import Window
from ..reference import Reference
from ..statistics import Method, Samples, fit_transport, samples
from . import comfy_guidance
from .base import HostError, inside, require_channels
from .comfy_guidance import Sampling, fit_mask, percent_of

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

    @property
    def title(self) -> str:
        return "AdaIN Color Guidance"

    def opened(self, sampling: Sampling) -> _Run:
        guider = sampling.guider
        graded = guider.model_options.get("denoise_mask_function") is not None
        return _Run(self, guider.model_patcher.model, sampling.keep, graded)

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
    return model.clone() if guidance.strength == 0 else comfy_guidance.attach(model, guidance)


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

    def guided(self, denoised: Tensor, sigma: Tensor) -> Tensor:
        """The predicted clean latent (B, C, ...positions), matched if the step lies inside the window."""
        level, sampling = float(sigma.flatten()[0]), self.base.model_sampling
        if not inside(sampling, self.guidance.window, level):
            return denoised
        strength = self.guidance.strength_at(percent_of(sampling, level))
        if strength == 0:
            return denoised
        where, measured = self.masks(denoised)
        target = self.target(denoised.device)
        rows, fitted = [], 0
        for i, row in enumerate(denoised.float()):
            weight = None if measured is None else measured[i % measured.shape[0]].expand(row.shape[1:])
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
        where = None if self.guidance.mask is None else fit_mask(self.guidance.mask, denoised)
        keep = None if self.keep is None else fit_mask(self.keep, denoised)
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

    def finish(self) -> None:
        """Raise if no step of the run was matched."""
        if self.steps == 0 and self.guidance.required:
            window = self.guidance.window
            raise HostError(
                f"{self.guidance.title} changed nothing: no step of this run lies between {window.start} and "
                f"{window.end} of the schedule, or its mask and the inpainting mask have nothing in common. Widen "
                "start and end percent, check that the sampler's denoise reaches that part, or move the mask"
            )
