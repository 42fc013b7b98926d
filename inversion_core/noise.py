"""Noise policies: how a clean latent gets the noise with which a model reads it at each level of its schedule.

Conventions, those of k-diffusion and ComfyUI: a noisy latent is `x = clean + sigma * noise`, all in the model's own
latent space (for ComfyUI, behind `process_latent_in`); a schedule of sigmas falls and ends with 0, as samplers take it;
a denoiser is a callable `denoise(x, sigma)` that predicts the clean latent, shapes (B, C, h, w) in and out. This is
the space of DDPM and DDIM divided by sqrt(alpha_bar), with sigma^2 = (1 - alpha_bar) / alpha_bar. Flow matching, where
the clean latent fades as the noise grows, has other formulas and is not served here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
"""`denoise(x, sigma)`: noisy (B, C, h, w) -> predicted clean (B, C, h, w)."""

OnStep = Callable[[int, Tensor, Tensor, int], None]
"""`on_step(step, clean, x, steps)` after each step, counted from 0, with the step's predicted clean and its noisy
latent. It may raise to interrupt; ComfyUI's sampling callbacks have this signature."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Noisy latents of one picture, one for each level of a schedule. Immutable.

    Attributes:
        sigmas: (S,) float32 on the CPU, falling, the last one 0.
        latents: (S, C, h, w) float32 on the CPU, in the model's latent space; the last one is the clean latent.

    Raises:
        ValueError: the sigmas do not fall to 0, the shapes do not agree, or a value is not finite.
    """

    sigmas: Tensor
    latents: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", self.sigmas.detach().to("cpu", torch.float32))
        object.__setattr__(self, "latents", self.latents.detach().to("cpu", torch.float32))
        _require_schedule(self.sigmas)
        if self.latents.ndim != 4 or self.latents.shape[0] != self.sigmas.shape[0]:
            raise ValueError(
                f"the latents of a trajectory are {tuple(self.latents.shape)}, but its {self.sigmas.shape[0]} sigmas "
                f"need ({self.sigmas.shape[0]}, C, h, w): one latent for each"
            )
        _require_finite(self.latents, "the latents of a trajectory")

    @property
    def start(self) -> Tensor:
        """The latent (1, C, h, w) at the highest level: what a sampler starts from to get the picture back."""
        return self.latents[:1]

    @property
    def clean(self) -> Tensor:
        """The clean latent (1, C, h, w)."""
        return self.latents[-1:]

    def at(self, sigma: float) -> Tensor:
        """The noisy latent (1, C, h, w) at any level: clean + sigma * `noise_at(sigma)`."""
        return self.clean + sigma * self.noise_at(sigma)

    def noise_at(self, sigma: float) -> Tensor:
        """The noise (1, C, h, w) in the noisy latent at any level: of about unit variance, but for DDIM of less at low
        ones, where the flow has hardly left the picture.

        Between two levels it is interpolated, not the latents: the clean part is the same at all levels, and a mean of
        two latents whose noises are independent, as edit-friendly inversion has them, holds too little noise (at the
        middle 0.7 of it), which a model takes for a blurred picture. So the noise goes along the arc from one to the
        other (slerp), its length linearly. Its place on the arc is that of a straight line between the latents, which
        is what a DDIM step would take between the two levels. Above the highest level and below the lowest but 0 the
        noise is that of the nearest level.

        Raises:
            ValueError: sigma is negative or not finite.
        """
        if not (math.isfinite(sigma) and sigma >= 0):
            raise ValueError(f"sigma is {sigma}, but a noise level is a finite number from 0 on")
        levels = self.sigmas[:-1]
        above = int((levels >= sigma).sum()) - 1
        if above < 0:
            return self._noise_of(0)
        if above == len(levels) - 1:
            return self._noise_of(above)
        upper, lower = float(levels[above]), float(levels[above + 1])
        share = (upper - sigma) / (upper - lower) * lower / sigma
        return _slerp(self._noise_of(above), self._noise_of(above + 1), share)

    def _noise_of(self, level: int) -> Tensor:
        return (self.latents[level : level + 1] - self.clean) / self.sigmas[level]


def ddim_inversion(
    denoise: Denoise, clean: Tensor, sigmas: Tensor, *, iterations: int = 1, on_step: OnStep | None = None
) -> Trajectory:
    """The latents from which DDIM (`ddim_sample`, ComfyUI's euler) comes back to a picture, about.

    Each step undoes one step of the sampler, `x_low = x_high + (low - high) * noise(x_high, high)`, in which x_high is
    unknown. The first guess at what the model sees there is x_low at the model's own scale of that level,
    `x_low * sqrt((1 + high^2) / (1 + low^2))`: DDIM inversion as Song et al. (arXiv 2010.02502) have it and diffusers'
    DDIMInverseScheduler computes it. More iterations put the result in for the guess again (fixed-point iteration, as
    in AIDI, arXiv 2309.04907): the sampler's way back gets closer, each for one more pass a step.

    Args:
        denoise: see the module; it is called with sigmas above 0 only.
        clean: (1, C, h, w), on the device and in the dtype to compute in.
        sigmas: (S,), falling to 0, the schedule of the sampler to be undone.
        iterations: passes for each step, 1 or more.
        on_step: see `OnStep`.

    Raises:
        ValueError: an argument is not as above.
    """
    levels = _require_schedule(sigmas)
    _require_clean(clean)
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, but a step needs at least 1")
    steps = len(levels) - 1
    x, found = clean, [clean]
    for step in range(steps):
        low, high = levels[steps - step], levels[steps - step - 1]
        x_high, predicted = x * math.sqrt((1 + high**2) / (1 + low**2)), x
        for _ in range(iterations):
            predicted = denoise(x_high, high)
            x_high = x + (high - low) * (x_high - predicted) / high
        x = x_high
        found.append(x)
        if on_step is not None:
            on_step(step, predicted, x, steps)
    return Trajectory(sigmas, torch.cat(found[::-1]))


def ddim_sample(denoise: Denoise, start: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None) -> Tensor:
    """Deterministic sampling (DDIM with eta 0, arXiv 2010.02502; in these conventions Euler's method).

    Args:
        denoise: see the module.
        start: (B, C, h, w) at the first sigma.
        sigmas: (S,), falling to 0.
        on_step: see `OnStep`.

    Returns:
        The clean latents (B, C, h, w).
    """
    levels = _require_schedule(sigmas)
    x = start
    for step, (high, low) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        predicted = denoise(x, high)
        x = predicted + low * (x - predicted) / high
        if on_step is not None:
            on_step(step, predicted, x, len(levels) - 1)
    return x


def edit_friendly_inversion(
    denoise: Denoise, clean: Tensor, sigmas: Tensor, seed: int, *, on_step: OnStep | None = None
) -> tuple[Trajectory, Tensor]:
    """Latents and noise maps with which DDPM sampling (`ddpm_sample`) gives exactly this picture.

    Huberman-Spiegelglas et al., "An Edit Friendly DDPM Noise Space" (arXiv 2304.06140): every level of the trajectory
    gets noise of its own, independent of the others; the noise map of a step is then what must be added to the mean of
    DDPM's posterior to come from one level to the next. One pass a step.

    Differences from the authors' code: the schedule is any, in sigmas; the last step, to which DDPM adds no noise,
    keeps its remainder as its map, where theirs drops it, so that the reconstruction is exact; the maps are not
    multiplied by a guidance of their own.

    Args:
        denoise: see the module.
        clean: (1, C, h, w), on the device and in the dtype to compute in.
        sigmas: (S,), falling to 0.
        seed: of the levels' noise: the same on every device.
        on_step: see `OnStep`.

    Returns:
        The trajectory, and the noise maps (S - 1, C, h, w), float32 on the CPU, in the order of sampling.

    Raises:
        ValueError: an argument is not as above.
    """
    levels = _require_schedule(sigmas)
    _require_clean(clean)
    steps = len(levels) - 1
    noise = torch.randn((steps, *clean.shape[1:]), generator=torch.Generator().manual_seed(seed)).to(clean)
    latents = [clean + sigma * noise[i : i + 1] for i, sigma in enumerate(levels[:-1])] + [clean]
    maps = []
    for step in range(steps):
        predicted = denoise(latents[step], levels[step])
        mean, spread = _posterior(latents[step], predicted, levels[step], levels[step + 1])
        maps.append((latents[step + 1] - mean) / spread)
        if on_step is not None:
            on_step(step, predicted, latents[step], steps)
    return Trajectory(sigmas, torch.cat(latents)), torch.cat(maps).detach().to("cpu", torch.float32)


def ddpm_sample(
    denoise: Denoise, start: Tensor, sigmas: Tensor, noise_maps: Tensor, *, on_step: OnStep | None = None
) -> Tensor:
    """DDPM sampling (arXiv 2006.11239; DDIM with eta 1) with given noise.

    Args:
        denoise: see the module.
        start: (B, C, h, w) at the first sigma.
        sigmas: (S,), falling to 0.
        noise_maps: (S - 1, C, h, w), one for each step, the same for every row of the batch. The last one is added as
            it is: zeros for plain DDPM, the remainder after `edit_friendly_inversion`.
        on_step: see `OnStep`.

    Returns:
        The clean latents (B, C, h, w).

    Raises:
        ValueError: the sigmas do not fall to 0, or the maps do not fit them or the start.
    """
    levels = _require_schedule(sigmas)
    needed = (len(levels) - 1, *start.shape[1:])
    if noise_maps.shape != needed:
        raise ValueError(
            f"the noise maps are {tuple(noise_maps.shape)}, but {len(levels) - 1} steps on latents "
            f"{tuple(start.shape)} need {needed}: use the sigmas and the size they were found with"
        )
    x = start
    for step, (high, low) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        predicted = denoise(x, high)
        mean, spread = _posterior(x, predicted, high, low)
        x = mean + spread * noise_maps[step].to(x)
        if on_step is not None:
            on_step(step, predicted, x, len(levels) - 1)
    return x


def _posterior(x: Tensor, predicted: Tensor, high: float, low: float) -> tuple[Tensor, float]:
    """Mean and deviation of DDPM's step from one level to a lower one; to level 0 the deviation is 0, given as 1.

    DDPM's q(x_low | x_high, clean) (arXiv 2006.11239, eq. 6 and 7) is normal with the mean
    `clean + low^2 / high^2 * (x_high - clean)` and the variance `low^2 * (high^2 - low^2) / high^2`. The 1 is the unit
    in which the last step's noise map counts.
    """
    mean = predicted + (low / high) ** 2 * (x - predicted)
    return mean, low * math.sqrt(1 - (low / high) ** 2) if low > 0 else 1.0


def _slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From a (share 0) to b (share 1): the direction along the arc, the length linearly."""
    flat_a, flat_b = a.double().flatten(), b.double().flatten()
    length_a, length_b = float(flat_a.norm()), float(flat_b.norm())
    product = length_a * length_b
    angle = math.acos(min(max(float(flat_a @ flat_b) / product, -1.0), 1.0)) if product > 0 else 0.0
    if math.sin(angle) < 1e-6:
        return torch.lerp(a, b, share)  # no arc, or none that is shorter than the others
    length = length_a + share * (length_b - length_a)
    weight_a = math.sin((1 - share) * angle) / math.sin(angle) * length / length_a
    weight_b = math.sin(share * angle) / math.sin(angle) * length / length_b
    return weight_a * a + weight_b * b


def _require_schedule(sigmas: Tensor) -> list[float]:
    """The schedule as numbers, or ValueError if it is none."""
    levels = sigmas.tolist() if sigmas.ndim == 1 else []
    falls = all(low < high for high, low in zip(levels[:-1], levels[1:], strict=True))
    if len(levels) < 2 or not all(map(math.isfinite, levels)) or not falls or levels[-1] != 0:
        shown = levels if 0 < len(levels) <= 8 else f"a tensor of shape {tuple(sigmas.shape)}"
        raise ValueError(
            f"sigmas are {shown}, but a schedule is a list of two or more finite numbers, each smaller than the one "
            "before, the last one 0: take a scheduler's whole output"
        )
    return levels


def _require_clean(clean: Tensor) -> None:
    if clean.ndim != 4 or clean.shape[0] != 1 or not clean.is_floating_point():
        raise ValueError(
            f"the clean latent is {tuple(clean.shape)} of {clean.dtype}, but one picture as floating point numbers "
            "(1, C, h, w) is inverted: invert pictures one by one"
        )
    _require_finite(clean, "the clean latent")


def _require_finite(x: Tensor, name: str) -> None:
    wrong = int((~x.isfinite()).sum())
    if wrong:
        raise ValueError(
            f"{wrong} of {x.numel()} values of {name} are not finite: the model or the autoencoder overflowed; run it "
            "in float32 or bfloat16"
        )
