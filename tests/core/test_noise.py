"""Inversions against diffusers' schedulers, with a denoiser known in closed form."""

import functools
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddim_inverse import DDIMInverseScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inversion_core.noise import (
    Trajectory,
    ddim_inversion,
    ddim_sample,
    ddpm_sample,
    edit_friendly_inversion,
)

SHAPE = (1, 2, 4, 3)
SIGMAS = torch.tensor([14.6, 7.0, 3.0, 1.2, 0.5, 0.2, 0.03, 0.0])


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """The ideal denoiser of pictures whose values are normal, with mean 0.3 and deviation 0.8."""
    return 0.3 + 0.64 / (0.64 + sigma**2) * (x - 0.3)


def mixture(x: Tensor, sigma: float) -> Tensor:
    """The ideal denoiser of pictures whose values lie around -1 or 0.5, deviation 0.4: curved as a real one is."""
    variance = 0.16 + sigma**2
    share = torch.sigmoid(((x + 1) ** 2 - (x - 0.5) ** 2) / (2 * variance))
    centre = -1 + 1.5 * share
    return centre + 0.16 / variance * (x - centre)


def clean_picture(seed: int = 0) -> Tensor:
    return 0.4 * random(*SHAPE, seed=seed) + torch.where(random(*SHAPE, seed=seed + 1000) > 0, 0.5, -1.0).double()


# --- diffusers as oracle ----------------------------------------------------------------------------------------------

STEPS = 20


def scheduler(kind: Any, **changes: Any) -> Any:
    """SD's schedule, in float64, on 20 steps that end at the clean latent."""
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    found = kind(**settings, **changes)
    found.alphas_cumprod = found.alphas_cumprod.double()
    if hasattr(found, "alphas"):
        found.alphas, found.betas = found.alphas.double(), found.betas.double()
    found.set_timesteps(STEPS)
    return found


def levels(oracle: Any) -> Tensor:
    """The sigmas of its timesteps, falling to 0."""
    alphas = oracle.alphas_cumprod[oracle.timesteps.sort(descending=True).values]
    return torch.cat([((1 - alphas) / alphas).sqrt(), torch.zeros(1).double()])


def predicted_noise(x: Tensor, alpha: Tensor) -> Tensor:
    """The mixture's noise prediction for a latent at the scale of DDPM."""
    sigma = ((1 - alpha) / alpha).sqrt()
    unscaled = x / alpha.sqrt()
    return (unscaled - mixture(unscaled, float(sigma))) / sigma


def agree(found: Tensor, expected: Tensor) -> None:
    """To the precision of a trajectory, which is kept as float32."""
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)


def test_ddim_inversion_is_diffusers() -> None:
    oracle = scheduler(DDIMInverseScheduler)
    x, expected = clean_picture(), [clean_picture()]
    for t in oracle.timesteps:
        alpha = oracle.alphas_cumprod[t]
        x = oracle.step(predicted_noise(x, alpha), t, x).prev_sample
        expected.append(x / alpha.sqrt())
    found = ddim_inversion(mixture, clean_picture(), levels(oracle))
    agree(found.latents, torch.cat(expected[::-1]))


def test_ddim_sampling_is_diffusers() -> None:
    oracle = scheduler(DDIMScheduler)
    start = random(*SHAPE, seed=5)
    x = start
    for t in oracle.timesteps:
        x = oracle.step(predicted_noise(x, oracle.alphas_cumprod[t]), t, x).prev_sample
    scale = oracle.alphas_cumprod[oracle.timesteps[0]].sqrt()
    agree(ddim_sample(mixture, start / scale, levels(oracle)), x)


def test_ddpm_sampling_is_diffusers() -> None:
    """The noise that diffusers draws, given to ours. Without any at the last step, as in DDPM."""
    oracle = scheduler(DDPMScheduler)
    start = random(*SHAPE, seed=5)
    x, generator = start, torch.Generator().manual_seed(3)
    for t in oracle.timesteps:
        x = oracle.step(predicted_noise(x, oracle.alphas_cumprod[t]), t, x, generator=generator).prev_sample
    drawn = torch.Generator().manual_seed(3)
    maps = torch.cat([torch.randn(SHAPE, generator=drawn, dtype=torch.float64) for _ in range(STEPS - 1)])
    maps = torch.cat([maps, torch.zeros(SHAPE).double()])
    scale = oracle.alphas_cumprod[oracle.timesteps[0]].sqrt()
    agree(ddpm_sample(mixture, start / scale, levels(oracle), maps), x)


def test_edit_friendly_noise_maps_are_those_that_diffusers_needs() -> None:
    """DDIM with eta 1, given our maps, steps through our trajectory."""
    oracle = scheduler(DDIMScheduler)
    trajectory, maps = edit_friendly_inversion(mixture, clean_picture(), levels(oracle), seed=7)
    for i, t in enumerate(oracle.timesteps[:-1]):
        alpha, next_alpha = oracle.alphas_cumprod[t], oracle.alphas_cumprod[oracle.timesteps[i + 1]]
        x = trajectory.latents[i : i + 1].double() * alpha.sqrt()
        noise = maps[i : i + 1].double()
        after = oracle.step(predicted_noise(x, alpha), t, x, eta=1.0, variance_noise=noise).prev_sample
        agree(trajectory.latents[i + 1 : i + 2], after / next_alpha.sqrt())


# --- what the inversions promise --------------------------------------------------------------------------------------


def schedule(steps: int) -> Tensor:
    return torch.cat([torch.logspace(1.1, -1.5, steps), torch.zeros(1)])


def roundtrip_error(denoise: Callable, steps: int, iterations: int = 1) -> float:
    clean = clean_picture()
    trajectory = ddim_inversion(denoise, clean, schedule(steps), iterations=iterations)
    back = ddim_sample(denoise, trajectory.start.double(), schedule(steps))
    return float((back - clean).square().mean().sqrt())


def test_ddim_inversion_comes_back_the_closer_the_more_steps() -> None:
    """Euler's method is of first order: four times the steps leave about a quarter of the error, at most half."""
    coarse, fine = roundtrip_error(mixture, 25), roundtrip_error(mixture, 100)
    assert 0 < fine < coarse / 2


def test_iterations_find_the_latent_that_the_sampler_comes_back_from() -> None:
    once, thrice, often = (roundtrip_error(mixture, 25, iterations) for iterations in (1, 3, 60))
    assert thrice < once / 2
    assert often < 1e-4


def test_ddim_inversion_follows_the_probability_flow() -> None:
    """For normal data the flow is known: it stretches each value's distance from the mean by sqrt(1 + sigma^2 / 0.64).

    Euler's error is of the order of a step: 400 of them over 2.6 decades of sigma, 1.5 % each."""
    clean = clean_picture()
    found = ddim_inversion(gaussian, clean, schedule(400))
    stretch = (1 + found.sigmas.double() ** 2 / 0.64).sqrt().view(-1, 1, 1, 1)
    expected = 0.3 + (clean - 0.3) * stretch
    error = (found.latents - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert float(error.max()) < 0.015


@settings(deadline=None)
@given(
    st.lists(st.floats(0.01, 100.0), min_size=1, max_size=12, unique=True).filter(
        lambda found: len({torch.tensor(x).item() for x in found}) == len(found)
    ),
    st.integers(0, 2**31),
)
def test_edit_friendly_reconstructs_exactly_on_any_schedule(found: list[float], seed: int) -> None:
    """In float64 but for the maps, which are kept as float32: a rounding of theirs counts sigma_low at most."""
    sigmas = torch.tensor([*sorted(found, reverse=True), 0.0])
    trajectory, maps = edit_friendly_inversion(mixture, clean_picture(), sigmas, seed)
    back = ddpm_sample(mixture, trajectory.start.double(), sigmas, maps)
    torch.testing.assert_close(back, clean_picture(), rtol=0, atol=1e-4)


def test_edit_friendly_levels_have_noise_of_their_own() -> None:
    sigmas = torch.tensor([10.0, 5.0, 2.0, 0.0])
    clean = random(1, 4, 64, 64, seed=0)
    trajectory, _ = edit_friendly_inversion(mixture, clean, sigmas, seed=3)
    noise = torch.cat([trajectory.noise_at(float(sigma)) for sigma in sigmas[:-1]]).flatten(1)
    # 16384 values: a correlation of independent ones has a deviation of 1/128; five of them are never seen.
    torch.testing.assert_close(torch.corrcoef(noise), torch.eye(3), rtol=0, atol=5 / 128)
    torch.testing.assert_close(noise.std(dim=1), torch.ones(3), rtol=0, atol=5 / 128)


def test_the_seed_alone_decides_the_noise_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    first, second, other = (edit_friendly_inversion(mixture, clean_picture(), SIGMAS, seed) for seed in (3, 3, 4))
    assert torch.equal(first[0].latents, second[0].latents)
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0].latents[:-1], other[0].latents[:-1])
    assert torch.equal(torch.get_rng_state(), before)


def test_another_number_of_rows_replays_the_same_maps() -> None:
    trajectory, maps = edit_friendly_inversion(mixture, clean_picture(), SIGMAS, seed=3)
    back = ddpm_sample(mixture, trajectory.start.double().expand(3, -1, -1, -1), SIGMAS, maps)
    torch.testing.assert_close(back, clean_picture().expand(3, -1, -1, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["ddim inversion", "ddim", "edit-friendly inversion", "ddpm"])
def test_every_step_is_reported_and_can_interrupt(name: str) -> None:
    class Stop(Exception):
        pass

    steps, x = len(SIGMAS) - 1, clean_picture()
    maps = torch.zeros(steps, *SHAPE[1:])
    seen: list[tuple[int, int]] = []

    def run(on_step: Callable) -> None:
        if name == "ddim inversion":
            ddim_inversion(mixture, x, SIGMAS, on_step=on_step)
        elif name == "ddim":
            ddim_sample(mixture, x, SIGMAS, on_step=on_step)
        elif name == "edit-friendly inversion":
            edit_friendly_inversion(mixture, x, SIGMAS, 0, on_step=on_step)
        else:
            ddpm_sample(mixture, x, SIGMAS, maps, on_step=on_step)

    def record(step: int, clean: Tensor, noisy: Tensor, total: int) -> None:
        assert clean.shape == noisy.shape == SHAPE
        seen.append((step, total))

    def stop(step: int, *_: Any) -> None:
        if step == 2:
            raise Stop

    run(record)
    assert seen == [(step, steps) for step in range(steps)]
    with pytest.raises(Stop):
        run(stop)


def test_the_denoiser_is_asked_once_a_step_and_never_at_zero() -> None:
    asked: list[float] = []

    def record(x: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return mixture(x, sigma)

    ddim_inversion(record, clean_picture(), SIGMAS)
    edit_friendly_inversion(record, clean_picture(), SIGMAS, seed=0)
    falling = SIGMAS[:-1].tolist()
    assert asked == falling[::-1] + falling
    asked.clear()
    ddim_inversion(record, clean_picture(), SIGMAS, iterations=3)
    assert asked == [sigma for sigma in falling[::-1] for _ in range(3)]


# --- trajectories -----------------------------------------------------------------------------------------------------


@functools.cache
def trajectories() -> dict[str, Trajectory]:
    clean = random(1, 4, 32, 32, seed=0)
    return {
        "ddim": ddim_inversion(mixture, clean, SIGMAS),
        "edit-friendly": edit_friendly_inversion(mixture, clean, SIGMAS, seed=3)[0],
    }


@pytest.mark.parametrize("kind", ["ddim", "edit-friendly"])
def test_a_trajectory_goes_through_its_latents(kind: str) -> None:
    trajectory = trajectories()[kind]
    for sigma, latent in zip(trajectory.sigmas.tolist(), trajectory.latents, strict=True):
        torch.testing.assert_close(trajectory.at(sigma)[0], latent, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(st.floats(0, 40))
def test_between_two_levels_the_noise_has_the_level_of_both(sigma: float) -> None:
    """The length of the noise lies between its neighbours', for independent noises as for those of one flow."""
    for trajectory in trajectories().values():
        noises = [float(trajectory.noise_at(level).norm()) for level in SIGMAS.tolist()[:-1]]
        above = [n for n, level in zip(noises, SIGMAS.tolist(), strict=False) if level >= sigma]
        below = [n for n, level in zip(noises, SIGMAS.tolist(), strict=False) if level <= sigma]
        ends = [*above[-1:], *below[:1]]
        assert min(ends) * (1 - 1e-4) <= float(trajectory.noise_at(sigma).norm()) <= max(ends) * (1 + 1e-4)


@settings(deadline=None)
@given(st.floats(0, 40), st.floats(1e-6, 1e-3))
def test_a_trajectory_has_no_jumps(sigma: float, step: float) -> None:
    """Noise of unit length each value turns by less than a right angle within the narrowest gap, 0.17 wide."""
    for trajectory in trajectories().values():
        change = (trajectory.noise_at(sigma + step) - trajectory.noise_at(sigma)).square().mean().sqrt()
        assert float(change) < 100 * step + 1e-4


def test_between_two_levels_a_ddim_trajectory_is_the_line_that_ddim_takes() -> None:
    """On a fine schedule, where the noise turns little within a step, the arc is the line."""
    trajectory = ddim_inversion(mixture, random(1, 4, 32, 32, seed=0), schedule(200))
    for i in range(0, 199, 10):
        high, low = trajectory.sigmas[i : i + 2].tolist()
        middle = (high + low) / 2
        line = (trajectory.latents[i] + trajectory.latents[i + 1]) / 2
        torch.testing.assert_close(trajectory.at(middle)[0], line, rtol=1e-3, atol=1e-3 * middle)


@pytest.mark.parametrize("kind", ["ddim", "edit-friendly"])
def test_beyond_the_schedule_the_nearest_levels_noise_is_used(kind: str) -> None:
    trajectory = trajectories()[kind]
    assert torch.equal(trajectory.noise_at(100.0), trajectory.noise_at(14.7))
    assert torch.equal(trajectory.noise_at(0.001), trajectory.noise_at(0.029))
    torch.testing.assert_close(trajectory.noise_at(100.0), trajectory.noise_at(14.6), rtol=1e-5, atol=1e-6)
    assert torch.equal(trajectory.at(0.0), trajectory.clean)


def test_opposite_and_missing_noises_have_no_arc_and_still_a_noise() -> None:
    noise = torch.ones(1, 1, 2, 2)
    opposite = Trajectory(torch.tensor([2.0, 1.0, 0.0]), torch.cat([noise * 2, -noise, noise * 0]))
    missing = Trajectory(torch.tensor([2.0, 1.0, 0.0]), torch.cat([noise * 2, noise * 0, noise * 0]))
    for trajectory in (opposite, missing):
        assert bool(trajectory.at(1.5).isfinite().all())


def test_a_trajectory_cannot_be_changed_and_is_kept_as_float32() -> None:
    trajectory = ddim_inversion(mixture, clean_picture(), SIGMAS)
    with pytest.raises(FrozenInstanceError):
        trajectory.latents = torch.zeros(1)  # pyright: ignore[reportAttributeAccessIssue]
    assert trajectory.latents.dtype == trajectory.sigmas.dtype == trajectory.at(1.0).dtype == torch.float32
    assert trajectory.start.shape == trajectory.clean.shape == trajectory.noise_at(1.0).shape == SHAPE


# --- errors -----------------------------------------------------------------------------------------------------------

WRONG_SCHEDULES = {
    "rising": [0.0, 1.0, 2.0],
    "twice the same": [2.0, 2.0, 0.0],
    "no zero": [2.0, 1.0],
    "below zero": [2.0, 0.0, -1.0],
    "too short": [0.0],
    "empty": [],
    "infinite": [math.inf, 1.0, 0.0],
    "not a number": [math.nan, 1.0, 0.0],
    "a batch": [[2.0, 1.0, 0.0]],
}


@pytest.mark.parametrize("sigmas", WRONG_SCHEDULES.values(), ids=WRONG_SCHEDULES)
def test_what_is_no_schedule_is_refused_everywhere(sigmas: list) -> None:
    wrong, x = torch.tensor(sigmas), clean_picture()
    with pytest.raises(ValueError, match="sigmas are .*scheduler"):
        ddim_inversion(mixture, x, wrong)
    with pytest.raises(ValueError, match="sigmas are .*scheduler"):
        edit_friendly_inversion(mixture, x, wrong, 0)
    with pytest.raises(ValueError, match="sigmas are .*scheduler"):
        ddim_sample(mixture, x, wrong)
    with pytest.raises(ValueError, match="sigmas are .*scheduler"):
        ddpm_sample(mixture, x, wrong, torch.zeros(2, *SHAPE[1:]))
    with pytest.raises(ValueError, match="sigmas are .*scheduler"):
        Trajectory(wrong, torch.zeros(3, *SHAPE[1:]))


@pytest.mark.parametrize("clean", [torch.zeros(2, 4, 3, 3), torch.zeros(4, 3, 3), torch.zeros(1, 4, 3, 3).long()])
def test_only_one_picture_is_inverted(clean: Tensor) -> None:
    with pytest.raises(ValueError, match=r"clean latent is .*\(1, C, h, w\).*one by one"):
        ddim_inversion(mixture, clean, SIGMAS)
    with pytest.raises(ValueError, match=r"clean latent is .*\(1, C, h, w\).*one by one"):
        edit_friendly_inversion(mixture, clean, SIGMAS, 0)


def test_values_that_are_not_finite_are_refused() -> None:
    broken = clean_picture()
    broken[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="1 of 24 values of the clean latent are not finite"):
        ddim_inversion(mixture, broken, SIGMAS)
    with pytest.raises(ValueError, match="values of the latents of a trajectory are not finite"):
        ddim_inversion(lambda x, sigma: x * math.inf, clean_picture(), SIGMAS)


@pytest.mark.parametrize("shape", [(7, 2, 4, 3), (8, 2, 4), (1, 8, 2, 4, 3)])
def test_latents_that_do_not_fit_the_sigmas_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"latents of a trajectory are .*8 sigmas need \(8, C, h, w\)"):
        Trajectory(SIGMAS, torch.zeros(shape))


@pytest.mark.parametrize("shape", [(6, 2, 4, 3), (7, 2, 4, 4), (7, 1, 2, 4, 3)])
def test_noise_maps_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"noise maps are .*7 steps .*need \(7, 2, 4, 3\)"):
        ddpm_sample(mixture, clean_picture(), SIGMAS, torch.zeros(shape))


@pytest.mark.parametrize("sigma", [-1.0, math.nan, math.inf])
def test_what_is_no_level_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma is "):
        trajectories()["ddim"].at(sigma)


@pytest.mark.parametrize("iterations", [0, -1])
def test_no_iterations_are_refused(iterations: int) -> None:
    with pytest.raises(ValueError, match=f"iterations is {iterations}"):
        ddim_inversion(mixture, clean_picture(), SIGMAS, iterations=iterations)
