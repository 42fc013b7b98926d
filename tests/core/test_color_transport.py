"""Matching of distributions against independent implementations: closed formulas, scikit-image, Gaussian transport."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.exposure import match_histograms
from torch import Tensor

from inversion_core.statistics import Method, Samples, fit_transport, samples, spread, thinned

METHODS = get_args(Method)


def points(seed: int, channels: int = 3, count: int = 400) -> Tensor:
    """Correlated, skewed points (C, N) in float64."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.rand(channels, count, generator=generator, dtype=torch.float64) ** 2
    return torch.randn(channels, channels, generator=generator, dtype=torch.float64) @ raw * 0.4 + 0.3


def weights(seed: int, count: int = 400) -> Tensor:
    """Zeros, ones and values between."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, generator=generator, dtype=torch.float64) * 2 - 0.5).clamp(0, 1)


def moments(x: Tensor, weight: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    aweights = None if weight is None else weight.numpy()
    mean = np.average(x.numpy(), axis=1, weights=aweights)
    return mean, np.atleast_2d(np.cov(x.numpy(), ddof=0, aweights=aweights))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), channels=st.integers(1, 5), masked=st.booleans())
def test_adain_is_the_closed_formula(seed: int, channels: int, masked: bool) -> None:
    x, y = points(seed, channels), points(seed + 1, channels, 300)
    wx, wy = (weights(seed), weights(seed + 1, 300)) if masked else (None, None)
    (mean, cov), (mean_ref, cov_ref) = moments(x, wx), moments(y, wy)
    scale = np.sqrt(np.diag(cov_ref) / np.diag(cov))
    expected = (x.numpy() - mean[:, None]) * scale[:, None] + mean_ref[:, None]

    moved = fit_transport("adain", samples(x, wx), samples(y, wy), eps=1e-6)(x)

    np.testing.assert_allclose(moved.numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("channels", [1, 2, 3, 16])
def test_mkl_is_the_analytic_transport_between_gaussians(channels: int) -> None:
    """Against scipy's matrix roots: S^-1/2 (S^1/2 R S^1/2)^1/2 S^-1/2, exact for Gaussians."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(channels, 5000, generator=generator, dtype=torch.float64)
    y = torch.randn(channels, channels, generator=generator, dtype=torch.float64) @ torch.randn(
        channels, 4000, generator=generator, dtype=torch.float64
    )
    x[0] += 0.4 * x[-1]
    (mean, cov), (mean_ref, cov_ref) = moments(x), moments(y)
    root = np.real(np.asarray(scipy.linalg.sqrtm(cov)))
    inverse = np.linalg.inv(root)
    matrix = inverse @ np.real(np.asarray(scipy.linalg.sqrtm(root @ cov_ref @ root))) @ inverse
    expected = matrix @ (x.numpy() - mean[:, None]) + mean_ref[:, None]

    moved = fit_transport("mkl", samples(x), samples(y), eps=1e-6)(x)

    np.testing.assert_allclose(moved.numpy(), expected, rtol=0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), method=st.sampled_from(["mkl", "wct"]), masked=st.booleans())
def test_mkl_and_wct_give_the_references_mean_and_covariance(seed: int, method: Method, masked: bool) -> None:
    x, y = points(seed), points(seed + 1, count=300)
    wx, wy = (weights(seed), weights(seed + 1, 300)) if masked else (None, None)

    moved = fit_transport(method, samples(x, wx), samples(y, wy), eps=1e-7)(x)

    for found, wanted in zip(moments(moved, wx), moments(y, wy), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_histogram_is_scikit_images() -> None:
    """As many distinct values on both sides."""
    x, y = points(1), points(2)
    expected = match_histograms(x.T.numpy()[:, None], y.T.numpy()[:, None], channel_axis=-1)[:, 0].T
    moved = fit_transport("histogram", samples(x), samples(y))(x)
    np.testing.assert_allclose(moved.numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("levels", [None, 256, 5])
@pytest.mark.parametrize("count", [400, 977])
def test_equal_values_and_other_counts_take_the_mean_of_what_scikit_image_gives_each(
    levels: int | None, count: int
) -> None:
    """8-bit pictures, coarse ones with many ties, more points in the reference.

    The oracle: every point is repeated until both sides have as many, all are told apart by their ranks, scikit-image
    matches the ranks, and what points of one value got is averaged.
    """
    x, y = points(1), points(2, count=count)
    if levels is not None:
        x, y = ((one * levels).round() / levels for one in (x, y))

    moved = fit_transport("histogram", samples(x), samples(y))(x)

    for row, row_ref, found in zip(x.numpy(), y.numpy(), moved.numpy(), strict=True):
        many, many_ref = np.repeat(row, count), np.sort(np.repeat(row_ref, 400))
        apart = np.argsort(np.argsort(many, kind="stable"), kind="stable").astype(np.float64)
        apart_ref = many_ref + np.arange(many_ref.size) * 1e-14
        each = match_histograms(apart[:, None], apart_ref[:, None])[:, 0]
        values, place = np.unique(many, return_inverse=True)
        means = np.bincount(place, each) / np.bincount(place)
        np.testing.assert_allclose(found, means[np.searchsorted(values, row)], rtol=0, atol=1e-8)


def test_two_flat_tones_keep_their_counterparts_though_their_shares_differ() -> None:
    """52 % dark here, 48 % there: scikit-image's rule makes everything light."""
    x, y = (torch.tensor([0.2] * dark + [0.6] * (100 - dark))[None] for dark in (52, 48))
    dark, light = fit_transport("histogram", samples(x), samples(y + 0.1))(x)[0, [0, -1]].tolist()
    assert dark == pytest.approx((48 * 0.3 + 4 * 0.7) / 52, abs=1e-6) and light == pytest.approx(0.7, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), method=st.sampled_from(METHODS))
def test_a_mask_of_zeros_and_ones_is_a_selection(seed: int, method: Method) -> None:
    x, y = points(seed), points(seed + 1)
    inside, inside_ref = weights(seed) > 0.4, weights(seed + 1) > 0.4

    masked = fit_transport(method, samples(x, inside.double()), samples(y, inside_ref.double()))(x[:, inside])
    alone = fit_transport(method, samples(x[:, inside]), samples(y[:, inside_ref]))(x[:, inside])

    torch.testing.assert_close(masked, alone, rtol=0, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), method=st.sampled_from(METHODS), masked=st.booleans())
def test_a_distribution_matched_to_itself_stays(seed: int, method: Method, masked: bool) -> None:
    x = points(seed)
    found = samples(x, weights(seed) if masked else None)
    torch.testing.assert_close(fit_transport(method, found, found)(x), x, rtol=0, atol=1e-9)


def test_sliced_transport_comes_nearer_than_any_linear_map() -> None:
    """A curved source: matching moments leaves its shape, transport does not. Sliced Wasserstein distance, new axes."""
    generator = torch.Generator().manual_seed(5)
    angle = torch.rand(2000, generator=generator, dtype=torch.float64) * 3
    x = torch.stack([angle.cos(), angle.sin(), angle * 0.1])
    y = torch.randn(3, 2000, generator=generator, dtype=torch.float64) * 0.3
    axes = torch.randn(100, 3, generator=generator, dtype=torch.float64)
    axes = axes / axes.norm(dim=1, keepdim=True)

    def distance(method: Method) -> float:
        moved = fit_transport(method, samples(x), samples(y))(x)
        return float(((axes @ moved).sort(dim=1)[0] - (axes @ y).sort(dim=1)[0]).abs().mean())

    assert distance("sliced_ot") < 0.5 * min(distance("mkl"), distance("wct"), distance("adain"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_flat_and_single_points_go_to_the_references_mean(method: Method, dtype: torch.dtype) -> None:
    flat, pixel = torch.full((3, 50), 0.25, dtype=dtype), torch.full((3, 1), 0.75, dtype=dtype)
    y = points(3).to(dtype)
    mean = y.double().mean(1, keepdim=True).expand(3, 50)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    moved = fit_transport(method, samples(flat), samples(y))(flat)
    assert moved.dtype == dtype
    torch.testing.assert_close(moved.double(), mean, rtol=0, atol=tolerance)
    onto = fit_transport(method, samples(y), samples(pixel))(y).double()
    # The covariance of a flat reference counts as eps squared, so up to some eps of spread remains.
    torch.testing.assert_close(onto, torch.full_like(onto, 0.75), rtol=0, atol=tolerance + 5e-3)
    both = fit_transport(method, samples(pixel), samples(pixel))(y)
    assert both.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_statistics_of_half_precision_are_float32(method: Method) -> None:
    """65,536 values near 100: their sum overflows float16."""
    x = (points(0, count=65_536) + 100).half()
    moved = fit_transport(method, samples(x), samples(points(1).half()))(x)
    assert moved.dtype == torch.float16 and moved.isfinite().all()


def test_what_cannot_be_matched_is_refused() -> None:
    x, empty = points(0), torch.zeros(400, dtype=torch.float64)
    with pytest.raises(ValueError, match="mask of the source is empty: paint"):
        fit_transport("adain", samples(x, empty), samples(x))
    with pytest.raises(ValueError, match="mask of the reference is empty"):
        fit_transport("mkl", samples(x), samples(x, empty))
    with pytest.raises(ValueError, match="source has 3 channels but the reference 4"):
        fit_transport("mkl", samples(x), samples(points(0, 4)))
    with pytest.raises(ValueError, match="method is 'magic', allowed are adain, mkl"):
        fit_transport("magic", samples(x), samples(x))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"mask has shape \(3,\).*needs \(400,\)"):
        samples(x, torch.ones(3))


@settings(max_examples=30, deadline=None)
@given(total=st.integers(1, 5000), share=st.floats(0.01, 1))
def test_spread_indices_rise_and_lie_evenly(total: int, share: float) -> None:
    count = max(1, int(total * share))
    found = spread(total, count)
    assert len(found) == count and int(found[0]) >= 0 and int(found[-1]) < total
    assert bool((found.diff() >= 0).all())
    assert bool((found - torch.arange(count) * total / count).abs().max() <= total / count + 1)


def test_thinning_keeps_points_with_weight_only() -> None:
    found = thinned(Samples(points(0), weights(0)), 50)
    assert found.values.shape == (3, 50) and bool((found.weight > 0).all())
