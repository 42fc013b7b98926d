"""Channel statistics and AdaIN against the closed formulas in float64 numpy, and their invariants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inversion_core.statistics import (
    adain,
    align_mask,
    apply_statistics,
    channel_statistics,
    require_nonempty_mask,
    standardise,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def maps(seed: int, b: int, c: int, h: int, w: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(b, c, h, w, generator=generator, dtype=torch.float64) * 0.7 + 1.3).to(dtype)


def soft_mask(seed: int, b: int, h: int, w: int) -> Tensor:
    """Zeros, ones and values between; at least two positions have weight."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(b, h, w, generator=generator) * 2 - 0.5).clamp(0, 1)
    mask[:, 0, 0], mask[:, -1, -1] = 1, 0.5
    return mask


def closed_form(x: Tensor, reference: Tensor, mask: Tensor | None, mask_ref: Tensor | None, strength: float) -> Any:
    """AdaIN written out: the square root of the weighted mean square deviation, one channel at a time."""
    out = x.double().numpy().copy()
    for b in range(out.shape[0]):
        rb = b if reference.shape[0] > 1 else 0
        for c in range(out.shape[1]):
            source, target = out[b, c].copy(), reference[rb, c].double().numpy()
            weight = np.ones_like(source) if mask is None else mask[b % mask.shape[0]].double().numpy()
            weight_ref = np.ones_like(target) if mask_ref is None else mask_ref[b % mask_ref.shape[0]].double().numpy()
            mean, mean_ref = np.average(source, weights=weight), np.average(target, weights=weight_ref)
            std = np.sqrt(np.average((source - mean) ** 2, weights=weight))
            std_ref = np.sqrt(np.average((target - mean_ref) ** 2, weights=weight_ref))
            matched = (source - mean) / std * std_ref + mean_ref
            out[b, c] = source + strength * (1 if mask is None else weight) * (matched - source)
    return out


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 6), st.integers(2, 6)),
    size_ref=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    masks=st.tuples(st.booleans(), st.booleans()),
    shared_reference=st.booleans(),
    strength=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_adain_equals_the_closed_formula_in_both_layouts(
    seed: int,
    sizes: tuple[int, int, int, int],
    size_ref: tuple[int, int],
    masks: tuple[bool, bool],
    shared_reference: bool,
    strength: float,
    dtype: torch.dtype,
) -> None:
    b, c, h, w = sizes
    x = maps(seed, b, c, h, w, dtype)
    reference = maps(seed + 1, 1 if shared_reference else b, c, *size_ref, dtype=dtype) * 2
    mask = soft_mask(seed, b, h, w) if masks[0] else None
    mask_ref = soft_mask(seed + 2, reference.shape[0], *size_ref) if masks[1] else None
    expected = closed_form(x, reference, mask, mask_ref, strength)
    bound = TOLERANCE[dtype] * max(1.0, float(np.abs(expected).max()))

    out = adain(x, reference, mask, mask_ref, strength)
    assert out.dtype == dtype and out.shape == x.shape
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=0, atol=bound)

    tokens, tokens_ref = (t.flatten(2).transpose(1, 2) for t in (x, reference))
    flat, flat_ref = (None if m is None else m.flatten(1) for m in (mask, mask_ref))
    out = adain(tokens, tokens_ref, flat, flat_ref, strength, layout="tokens")
    np.testing.assert_allclose(out.transpose(1, 2).reshape(x.shape).double().numpy(), expected, rtol=0, atol=bound)


def test_split_heads_are_a_token_layout() -> None:
    x, mask = maps(0, 2, 3, 5, 4), soft_mask(1, 2, 1, 5)[:, 0]
    whole = channel_statistics(x, mask, layout="tokens")
    for head in range(3):
        alone = channel_statistics(x[:, head], mask, layout="tokens")
        assert torch.equal(whole.mean[:, head], alone.mean) and torch.equal(whole.std[:, head], alone.std)
    assert whole.mean.shape == (2, 3, 1, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_statistics_are_float32_and_survive_a_large_offset(dtype: torch.dtype) -> None:
    """4096 values near 1000: summed in half precision they overflow, and E[x^2] - E[x]^2 loses them in float32."""
    x = (maps(0, 1, 2, 64, 64) + 1000).to(dtype)
    mean, std = channel_statistics(x)
    exact = x.double()
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean.double(), exact.mean((2, 3), keepdim=True), rtol=1e-6, atol=0)
    torch.testing.assert_close(std.double(), exact.std((2, 3), correction=0, keepdim=True), rtol=1e-4, atol=0)
    assert channel_statistics(x.double()).mean.dtype == torch.float64


def test_a_mask_selects_and_its_scale_does_not_matter() -> None:
    x, mask = maps(0, 2, 3, 6, 6), torch.zeros(1, 6, 6)
    mask[:, 1:3, 2:5] = 1
    mean, std = channel_statistics(x, mask)
    inside = x[:, :, 1:3, 2:5]
    torch.testing.assert_close(mean, inside.mean((2, 3), keepdim=True))
    torch.testing.assert_close(std, inside.std((2, 3), correction=0, keepdim=True))
    half = channel_statistics(x, mask[:, None] * 0.5)
    torch.testing.assert_close(half.std, std)
    changed = torch.where(mask[:, None] > 0, x, x + 100)
    assert torch.equal(channel_statistics(changed, mask).std, std)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), masked=st.booleans())
def test_the_image_as_its_own_reference_changes_nothing(seed: int, masked: bool) -> None:
    x, mask = maps(seed, 2, 3, 4, 5), soft_mask(seed, 2, 4, 5) if masked else None
    torch.testing.assert_close(adain(x, x, mask, mask), x)


def test_the_outside_and_strength_zero_are_bit_identical() -> None:
    x, reference, mask = (
        maps(0, 2, 3, 4, 5, torch.float16),
        maps(1, 2, 3, 4, 5, torch.float16) * 5,
        torch.zeros(1, 4, 5),
    )
    mask[:, 1:3] = 1
    out = adain(x, reference, mask)
    outside = (mask == 0).expand(2, -1, -1)
    assert torch.equal(out.movedim(1, -1)[outside], x.movedim(1, -1)[outside])
    assert not torch.equal(out, x)
    assert adain(x, reference, mask, strength=0.0) is x


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_flat_and_one_pixel_regions_are_safe(dtype: torch.dtype) -> None:
    x, flat = maps(0, 1, 3, 4, 4, dtype), torch.full((1, 3, 4, 4), 0.7, dtype=dtype)
    pixel, empty = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    pixel[:, 2, 1] = 1
    # What is flat only up to rounding keeps rounding / eps of the reference's contrast; a flat reference keeps eps.
    atol = {torch.float64: 1e-4, torch.float32: 0.02}.get(dtype, TOLERANCE[dtype])
    mean = x.double().mean((2, 3), keepdim=True).expand(1, 3, 4, 4)
    torch.testing.assert_close(adain(flat, x).double(), mean, rtol=0, atol=atol)  # a flat image takes the mean
    torch.testing.assert_close(adain(x, flat), flat, rtol=0, atol=atol)  # a flat reference flattens
    torch.testing.assert_close(adain(flat, flat), flat, rtol=0, atol=atol)
    to_pixel = adain(x, flat * 3, pixel, pixel)
    torch.testing.assert_close(to_pixel[:, :, 2, 1], flat[:, :, 2, 1] * 3, rtol=0, atol=atol)
    assert to_pixel.isfinite().all() and standardise(flat).isfinite().all()
    one = maps(1, 1, 3, 1, 1, dtype)
    torch.testing.assert_close(adain(one, x)[0, :, 0, 0].double(), mean[0, :, 0, 0], rtol=0, atol=atol)
    assert torch.equal(adain(x, x, empty, empty), x)


def test_gradients_through_a_flat_region_are_finite() -> None:
    x = torch.full((1, 1, 3, 3), 0.5, dtype=torch.float64, requires_grad=True)
    adain(x, maps(0, 1, 1, 3, 3)).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_standardise_has_mean_zero_and_deviation_one() -> None:
    x = maps(0, 2, 5, 7, 4)
    y = standardise(x[:, 0], layout="tokens")
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 4, dtype=y.dtype))
    torch.testing.assert_close(y.std(1, correction=0), torch.ones(2, 4, dtype=y.dtype))
    mask = soft_mask(0, 2, 7, 4)
    mean, std = channel_statistics(standardise(x, mask), mask)
    torch.testing.assert_close(mean, torch.zeros_like(mean))
    torch.testing.assert_close(std, torch.ones_like(std))
    target = channel_statistics(maps(5, 2, 5, 3, 3))
    moved = channel_statistics(apply_statistics(x, target, mask), mask)
    torch.testing.assert_close(moved.mean, target.mean)
    torch.testing.assert_close(moved.std, target.std)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[[0.0, 1.0]], [[0.0, 0.0]]]), r"my mask is empty .*\[1\] of 2: paint"),
        (torch.tensor([[[0.0, 1.5]]]), "my mask holds values from 0.0 to 1.5"),
        (torch.tensor([[[0.0, float("nan")]]]), "my mask holds values from nan"),
        (torch.zeros(0, 4, 4), "my mask has no elements"),
    ],
)
def test_bad_masks_are_named(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_nonempty_mask(mask, "my mask")
    require_nonempty_mask(torch.tensor([[[0.0, 1e-3]]]), "my mask")


def test_inputs_that_do_not_fit_are_refused() -> None:
    x = maps(0, 2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 5, 5\).*needs \(B or 1, 4, 4\) with B = 2"):
        adain(x, x, torch.ones(2, 5, 5))
    with pytest.raises(ValueError, match="mask has shape"):
        adain(x, x, None, torch.ones(3, 4, 4))
    with pytest.raises(ValueError, match=r"mask has shape \(1, 4, 4\).*\(B or 1, 4\)"):
        align_mask(torch.ones(1, 4, 4), x, layout="tokens")
    with pytest.raises(ValueError, match="as many axes and channels"):
        adain(x, x[:, :2])
    with pytest.raises(ValueError, match="batch size 3"):
        adain(x, maps(0, 3, 3, 4, 4))
    with pytest.raises(ValueError, match="strength is 1.5, allowed"):
        adain(x, x, strength=1.5)
