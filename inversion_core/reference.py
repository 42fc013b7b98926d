"""References: images as the model sees them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .noise import Trajectory


@dataclass(frozen=True, eq=False)
class Reference:
    """An image for a model to read from, at any size. Immutable.

    Attributes:
        latent: clean latent (1, C, h, w) as the autoencoder gave it, on the CPU.
        mask: (1, 1, h, w) in [0, 1] on the latent's grid, 1 where the reference may be read; None means everywhere.
        conditioning: the host's own conditioning for the reference's pass; None lets the host use the run's negative.
        noise_seed: seed of the fixed noise the latent is re-noised with at every step.
        strength: above 0; its weight beside other references read in the same place (a single one is read fully).
        picture: the image itself (1, 3, H, W) in [0, 1], sRGB, on the CPU, for feature extractors; None where it is not
            known.
        trajectory: an inversion, to be read in place of the fixed noise; in the model's latent space, not in the
            autoencoder's as `latent` is. None means the fixed noise.
    """

    latent: Tensor
    mask: Tensor | None = None
    conditioning: Any = None
    noise_seed: int = 0
    strength: float = 1.0
    trajectory: Trajectory | None = None
    picture: Tensor | None = None
    content: str = field(init=False)

    def __post_init__(self) -> None:
        if self.latent.ndim != 4 or self.latent.shape[0] != 1:
            raise ValueError(
                f"a reference is one image with a latent (1, C, h, w), but this one is {tuple(self.latent.shape)}: "
                "encode images one by one"
            )
        if self.mask is not None and self.mask.shape != (1, 1, *self.latent.shape[-2:]):
            raise ValueError(
                f"the mask is {tuple(self.mask.shape)}, but it must lie on the latent's grid: "
                f"(1, 1, {self.latent.shape[-2]}, {self.latent.shape[-1]})"
            )
        if self.mask is not None and not bool((self.mask > 0).any()):
            raise ValueError("the mask is empty: nothing of the reference could be read. Paint it or leave it out")
        if not 0 < self.strength <= 1e4:  # false for NaN too
            raise ValueError(f"the reference's strength is {self.strength}, but it must be above 0 (1 is neutral)")
        if self.picture is not None and (self.picture.ndim != 4 or self.picture.shape[:2] != (1, 3)):
            raise ValueError(f"the picture is {tuple(self.picture.shape)}, but it must be one image (1, 3, H, W)")
        if self.trajectory is not None and self.trajectory.clean.shape != self.latent.shape:
            raise ValueError(
                f"the trajectory is of a latent {tuple(self.trajectory.clean.shape)}, but this one is "
                f"{tuple(self.latent.shape)}: invert this reference itself"
            )
        object.__setattr__(self, "content", _digest(self.latent, self.noise_seed, self.trajectory))

    def __deepcopy__(self, memo: dict) -> Reference:
        return self  # immutable: hosts that copy their options may share it

    def noise(self) -> Tensor:
        """The reference's fixed noise (1, C, h, w), float32 on the CPU: the same on every device and in every run."""
        generator = torch.Generator().manual_seed(self.noise_seed)
        return torch.randn(self.latent.shape, generator=generator)

    def noise_at(self, sigma: float) -> Tensor:
        """The noise (1, C, h, w) to read this reference with at a noise level, float32 on the CPU.

        It is `noise()`, or the trajectory's at this level. Either way the noisy latent is what the model's own forward
        process makes of it and of the clean latent in the model's space: in ComfyUI
        `model_sampling.noise_scaling(sigma, noise, process_latent_in(latent))`.
        """
        return self.noise() if self.trajectory is None else self.trajectory.noise_at(sigma)


def _digest(latent: Tensor, seed: int, trajectory: Trajectory | None) -> str:
    digest = hashlib.sha256(f"{tuple(latent.shape)} {seed} ".encode())
    digest.update(_bytes(latent))
    if trajectory is not None:
        digest.update(_bytes(trajectory.sigmas))
        digest.update(_bytes(trajectory.latents))
    return digest.hexdigest()


def _bytes(values: Tensor) -> bytes:
    return values.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
