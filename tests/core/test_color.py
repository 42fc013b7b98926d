"""Matching of pictures: colour spaces, masks, alpha, batches, and what must not change."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from inversion_core import color
from inversion_core.color import ColorMatch, feathered, match_pictures, palette, to_rgb, to_space
from inversion_core.statistics import Method

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # colour-science warns that there is no matplotlib for its plots
    import colour
# It puts a stand-in there, at which other libraries that ask whether there is a matplotlib stumble.
for stand_in in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
    if getattr(sys.modules[stand_in], "__spec__", None) is None:
        del sys.modules[stand_in]

METHODS = get_args(Method)


def pictures(seed: int, count: int = 1, height: int = 10, width: int = 12, channels: int = 3) -> Tensor:
    """8-bit noise with a cast, so that the channels differ and values repeat; alpha has zeros and ones."""
    rng = np.random.default_rng(seed)
    image = rng.uniform(0, 1, (count, height, width, channels)) ** rng.uniform(0.5, 2, channels)
    if channels == 4:
        image[..., 3] = np.clip(image[..., 3] * 2 - 0.5, 0, 1)
    return torch.from_numpy((image * 255).round() / 255).float()


def soft_mask(seed: int, count: int = 1, height: int = 10, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(count, height, width, generator=generator) * 2 - 0.6).clamp(0, 1)
    mask[:, 4:7, 4:9] = 1
    return mask


matches = st.builds(
    ColorMatch,
    method=st.sampled_from(METHODS),
    space=st.sampled_from(["linear_rgb", "lab"]),
    strength=st.sampled_from([0.3, 1.0]),
    keep_luminance=st.booleans(),
    feather=st.sampled_from([0, 2]),
    frames=st.sampled_from(["each", "all", "one"]),
)


def test_lab_is_colour_sciences() -> None:
    rgb = pictures(0, height=40, width=40)[0]
    expected = colour.XYZ_to_Lab(
        colour.sRGB_to_XYZ(rgb.double().numpy()), colour.CCS_ILLUMINANTS["CIE 1931 2 Degree Standard Observer"]["D65"]
    )
    lab = to_space(rgb.movedim(-1, 0), "lab")
    # The two differ in the digits of the sRGB matrix and of the white point: far below a visible difference.
    np.testing.assert_allclose(lab.movedim(0, -1).numpy(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("space", ["linear_rgb", "lab"])
def test_spaces_lead_back(space: Any) -> None:
    rgb = pictures(0)[0].movedim(-1, 0)
    torch.testing.assert_close(to_rgb(to_space(rgb, space), space), rgb, rtol=0, atol=1e-4)


def test_adain_in_linear_light_is_the_closed_formula() -> None:
    x, y = pictures(0, height=30, width=30), pictures(1, height=20, width=20) * 0.5 + 0.2
    mask, mask_ref = soft_mask(0, height=30, width=30), soft_mask(1, height=20, width=20)

    out = match_pictures(x, y, mask, mask_ref, ColorMatch("adain", "linear_rgb"))

    def linear(image: Tensor) -> np.ndarray:
        return colour.models.eotf_sRGB(image[0].double().numpy()).reshape(-1, 3)

    def mean_and_std(values: np.ndarray, weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
        w = weight.double().numpy().ravel()
        mean = np.average(values, axis=0, weights=w)
        return mean, np.sqrt(np.average((values - mean) ** 2, axis=0, weights=w))

    (mean, std), (mean_ref, std_ref) = mean_and_std(linear(x), mask), mean_and_std(linear(y), mask_ref)
    moved = np.clip((linear(x) - mean) / std * std_ref + mean_ref, 0, 1)
    wanted = colour.models.eotf_inverse_sRGB(moved).reshape(30, 30, 3)
    share = mask[0, ..., None].double().numpy()
    expected = x[0].double().numpy() * (1 - share) + np.clip(wanted, 0, 1) * share
    np.testing.assert_allclose(out[0].double().numpy(), expected, rtol=0, atol=2e-4)


@settings(max_examples=60, deadline=None)
@given(match=matches, seed=st.integers(0, 1000), channels=st.sampled_from([3, 4]), masked=st.booleans())
def test_what_holds_for_every_match(match: ColorMatch, seed: int, channels: int, masked: bool) -> None:
    """In [0, 1]; the outside, transparent pixels and alpha bit for bit; no NaN; the input untouched."""
    x, y = pictures(seed, 2, channels=channels), pictures(seed + 1, 3, height=7, width=9)
    mask = soft_mask(seed, 2) if masked else None
    before = x.clone()

    out = match_pictures(x, y, mask, None, match)

    assert torch.equal(x, before) and out.shape == x.shape and out.dtype == x.dtype
    assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1
    outside = torch.zeros(2, 10, 12, dtype=torch.bool) if mask is None else mask == 0
    if channels == 4:
        outside |= x[..., 3] == 0
        assert torch.equal(out[..., 3], x[..., 3])
    assert torch.equal(out[outside], x[outside])
    assert not torch.equal(out, x)


@settings(max_examples=30, deadline=None)
@given(match=matches, seed=st.integers(0, 1000), masked=st.booleans())
def test_the_image_as_its_own_reference_changes_nothing(match: ColorMatch, seed: int, masked: bool) -> None:
    x, mask = pictures(seed), soft_mask(seed) if masked else None
    torch.testing.assert_close(match_pictures(x, x, mask, mask, match), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("frames", ["each", "all", "one"])
def test_strength_0_is_the_very_tensor(frames: Any) -> None:
    x = pictures(0, 2) * 3 - 1  # even values outside of [0, 1] stay
    assert match_pictures(x, pictures(1), match=ColorMatch(strength=0, frames=frames)) is x


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("space", ["linear_rgb", "lab"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_flat_and_one_pixel_regions_are_safe(method: Method, space: Any, dtype: torch.dtype) -> None:
    flat, x = torch.full((1, 6, 6, 3), 0.25, dtype=dtype), pictures(0, 1, 6, 6).to(dtype)
    pixel = torch.zeros(1, 6, 6)
    pixel[:, 2, 3] = 1
    match = ColorMatch(method, space)
    for image, reference, mask, mask_ref in (
        (flat, x, None, None),
        (x, flat, None, None),
        (x, x * 0.5, pixel, None),
        (x, x * 0.5, None, pixel),
        (flat, flat * 0, pixel, pixel),
        (flat[:, :1, :1], x, None, None),
    ):
        out = match_pictures(image, reference, mask, mask_ref, match)
        assert out.dtype == dtype and out.isfinite().all()
    onto = match_pictures(x, x * 0.5, pixel, pixel, match)
    torch.testing.assert_close(onto[:, 2, 3], x[:, 2, 3] * 0.5, rtol=0, atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_kept_luminance_is_kept_and_colour_is_not(method: Method) -> None:
    """Muted colours, so that the result stays inside sRGB."""
    x, y = pictures(0) * 0.2 + 0.4, pictures(1) * torch.tensor([0.15, 0.1, 0.1]) + torch.tensor([0.5, 0.4, 0.4])
    out = match_pictures(x, y, match=ColorMatch(method, "lab", keep_luminance=True))
    lab, lab_out, lab_ref = (colour.XYZ_to_Lab(colour.sRGB_to_XYZ(i[0].double().numpy())) for i in (x, out, y))
    np.testing.assert_allclose(lab_out[..., 0], lab[..., 0], atol=0.2)
    np.testing.assert_allclose(lab_out[..., 1:].mean((0, 1)), lab_ref[..., 1:].mean((0, 1)), atol=0.5)


def test_one_map_for_all_frames_does_not_flicker() -> None:
    """The same pixel comes out the same in every frame, whatever else is in the frame; by itself it does not."""
    x, y = pictures(0, 4), pictures(9)
    x[:, 0, 0] = torch.tensor([0.2, 0.6, 0.4])

    def spread_of(frames: Any) -> float:
        out = match_pictures(x, y, match=ColorMatch("mkl", "lab", frames=frames, frame=2))
        return float((out[:, 0, 0] - out[:1, 0, 0]).abs().max())

    assert spread_of("all") == spread_of("one") == 0
    assert spread_of("each") > 0.01


def test_one_frame_is_measured_and_its_result_is_that_of_itself_alone() -> None:
    x, y, mask = pictures(0, 3), pictures(9), soft_mask(0, 3)
    out = match_pictures(x, y, mask, None, ColorMatch(frames="one", frame=1))
    alone = match_pictures(x[1:2], y, mask[1:2], None, ColorMatch())
    assert torch.equal(out[1:2], alone)
    with pytest.raises(ValueError, match="frame is 3, but the batch has 3 pictures: allowed are 0 to 2"):
        match_pictures(x, y, None, None, ColorMatch(frames="one", frame=3))


def test_each_picture_takes_its_reference_and_the_last_serves_the_rest() -> None:
    x, y, mask_ref = pictures(0, 3), pictures(9, 2, 5, 6), soft_mask(4, 2, 5, 6)
    mask_ref[:, 2:4, 2:4] = 1
    out = match_pictures(x, y, None, mask_ref)
    for i, j in ((0, 0), (1, 1), (2, 1)):
        alone = match_pictures(x[i : i + 1], y[j : j + 1], None, mask_ref[j : j + 1])
        assert torch.equal(out[i : i + 1], alone)


def test_a_frame_without_the_object_stays_as_it_is() -> None:
    x, mask = pictures(0, 3), soft_mask(0, 3)
    mask[1] = 0
    for frames in ("each", "all"):
        out = match_pictures(x, pictures(1), mask, None, ColorMatch(frames=frames))
        assert torch.equal(out[1], x[1]) and not torch.equal(out[0], x[0])


def test_feathering_fades_in_from_the_edge() -> None:
    mask = torch.zeros(40, 40)
    mask[:, 20:] = 1
    row = feathered(mask, 6)[20]
    assert torch.equal(row[:20], torch.zeros(20)) and row[20] < 0.25 and row[28] > 0.99 and row[39] > 0.99
    assert bool((row.diff() >= -1e-6).all())
    torch.testing.assert_close(feathered(torch.ones(8, 8), 6), torch.ones(8, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.zeros(1, 10, 12)}, "the mask of the image is empty: paint"),
        ({"mask_ref": torch.zeros(1, 10, 12)}, "the mask of the reference is empty: paint"),
        ({"mask": torch.ones(1, 5, 5)}, r"the mask of the image has shape \(1, 5, 5\).*\(1 or 2, 10, 12\): resize"),
        ({"mask": torch.full((1, 10, 12), 2.0)}, "holds values from 2.0 to 2.0, allowed are 0 to 1"),
        ({"reference": torch.zeros(1, 4, 4, 1)}, r"the reference has shape \(1, 4, 4, 1\)"),
        ({"pictures": torch.zeros(0, 4, 4, 3)}, r"the image has shape \(0, 4, 4, 3\)"),
    ],
)
def test_what_cannot_be_matched_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match_pictures(**{"pictures": pictures(0, 2), "reference": pictures(1), **change})


def test_an_empty_entry_of_a_reference_mask_and_a_transparent_reference_are_refused() -> None:
    mask_ref = soft_mask(0, 2)
    mask_ref[1] = 0
    with pytest.raises(ValueError, match="the mask of the reference selects nothing in entry 1"):
        match_pictures(pictures(0, 2), pictures(1, 2), None, mask_ref)
    clear = pictures(1, channels=4) * torch.tensor([1.0, 1, 1, 0])
    with pytest.raises(ValueError, match="the reference selects nothing"):
        match_pictures(pictures(0), clear, match=ColorMatch(frames="all"))


@pytest.mark.parametrize(
    "change", [{"method": "x"}, {"space": "x"}, {"strength": 1.1}, {"feather": -1}, {"frames": "x"}]
)
def test_settings_outside_of_what_is_allowed_are_refused(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} is"):
        replace(ColorMatch(), **change)


@pytest.mark.parametrize("period", [None, 4, 8, 512])
def test_a_picture_larger_than_the_sample_is_still_met(period: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured in 1/4 of the pixels the result differs by less than an 8-bit step on average, in noise and in stripes
    as wide as the sample's step."""
    x, y = pictures(0, height=512, width=512), pictures(1, height=512, width=512)
    if period is not None:
        x *= 0.2 + 0.8 * (torch.arange(512) % period < period / 2).float()[:, None]
    drawn = match_pictures(x, y)
    monkeypatch.setattr(color, "SAMPLES", 1 << 20)
    difference = (match_pictures(x, y) - drawn).abs().mean()
    assert 0 < float(difference) < 1 / 255


@pytest.mark.parametrize("channels", [3, 4])
def test_pieces_make_no_difference(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the pieces lie outside the mask altogether."""
    x, y, mask = pictures(0, channels=channels).double(), pictures(1).double(), soft_mask(0)
    mask[:, :3] = 0
    whole = match_pictures(x, y, mask)
    monkeypatch.setattr(color, "_PIECE", 7)
    monkeypatch.setattr(color, "_PIECE_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    torch.testing.assert_close(match_pictures(x, y, mask), whole, rtol=0, atol=1e-9)


class _Large(TorchDispatchMode):
    """Notes the shape of every new tensor of more than so many elements."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(out, Tensor) and out.numel() > self.limit:
            is_result = func is torch.ops.aten.empty_like.default
            if is_result or out.untyped_storage().data_ptr() not in known:
                self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("frames", ["each", "all", "one"])
def test_memory_does_not_grow_with_the_number_of_frames(frames: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is the only tensor that is larger than a few frames."""
    monkeypatch.setattr(color, "SAMPLES", 2000)
    x, steps = pictures(0, 60, 40, 50), []
    with _Large(limit=x.numel() // 15) as made:
        match_pictures(x, pictures(1), match=ColorMatch(frames=frames), progress=lambda *at: steps.append(at))
    assert made.shapes == [tuple(x.shape)]
    assert steps == [(i + 1, 60) for i in range(60)]


def test_an_interrupt_in_progress_goes_through() -> None:
    def stop(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        match_pictures(pictures(0, 3), pictures(1), progress=stop)


def test_a_palette_names_the_colours_and_their_shares() -> None:
    x = torch.zeros(10, 10, 3)
    x[:7] = torch.tensor([0.8, 0.1, 0.1])
    x[7:] = torch.tensor([0.1, 0.2, 0.9])
    red, blue = palette(x)
    np.testing.assert_allclose(red.rgb, (0.8, 0.1, 0.1), atol=1e-3)
    np.testing.assert_allclose((red.share, blue.share), (0.7, 0.3), atol=1e-6)
    mask = torch.zeros(10, 10)
    mask[8:] = 1
    (only,) = palette(x, mask)
    np.testing.assert_allclose(only.rgb, (0.1, 0.2, 0.9), atol=1e-3)
    assert palette(x, mask * 0) == []
