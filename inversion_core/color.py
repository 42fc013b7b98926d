"""Colours of pictures matched to a reference's, inside soft masks; and palettes, to see what was matched.

Pictures are channel-last, (B, H, W, 3 or 4), sRGB in [0, 1]; masks (1 or B, H, W) in [0, 1]. A fourth channel is
alpha: it is passed on as it is, and where it is 0 nothing is measured or changed. Colour spaces are kornia's, which is
imported where it is used: it takes seconds, and ComfyUI's start must not wait for it.

Pictures are worked through in small pieces, on any device, so that beside the result only a fixed amount of memory is
needed whatever their number and size, and so that a piece stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .statistics import COLOUR_EPS, Method, Samples, Transport, fit_transport, spread, statistics_dtype

Space = Literal["linear_rgb", "lab"]
Frames = Literal["each", "all", "one"]
Progress = Callable[[int, int], None]

SAMPLES = 1 << 16
"""Pixels of each side that a match is measured in at most: a whole picture of 256x256.

Of more, that many are drawn evenly: a mean is then off by about 1/256 of the deviation at most, less than the step
between two 8-bit values, and the measuring costs a fraction of the conversion that every pixel needs.
"""

_PIECE, _PIECE_PER_THREAD = 1 << 16, 1 << 14
_PIECE_ELSEWHERE = 1 << 21
_UNIT: dict[Space, float] = {"linear_rgb": 1.0, "lab": 100.0}
"""From black to white, in which the smallest deviation that counts is given."""


@dataclass(frozen=True)
class ColorMatch:
    """How colours are matched.

    Attributes:
        method: see `statistics.fit_transport`.
        space: where: linear light, or CIELAB (D65).
        strength: 0 (unchanged) to 1 (fully matched).
        keep_luminance: only hue and chroma change, CIELAB's L stays, as far as the result lies inside sRGB.
        feather: width in pixels over which the change fades in, from the mask's edge inwards.
        frames: `"each"` picture of a batch is matched by itself; or one map, measured in `"all"` of them or in
            `"one"`, serves them all, so that a video does not flicker.
        frame: which one, counted from 0.
    """

    method: Method = "mkl"
    space: Space = "lab"
    strength: float = 1.0
    keep_luminance: bool = False
    feather: int = 0
    frames: Frames = "each"
    frame: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("method", Method), ("space", Space), ("frames", Frames)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}, allowed are {', '.join(get_args(kind))}")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength is {self.strength}, allowed is 0 (unchanged) to 1 (fully matched)")
        if self.feather < 0:
            raise ValueError(f"feather is {self.feather} pixels, but it cannot be negative")


def to_space(rgb: Tensor, space: Space) -> Tensor:
    """sRGB (..., 3, H, W) in [0, 1] -> linear RGB in [0, 1], or CIELAB (D65, L from 0 to 100)."""
    from kornia.color import rgb_to_lab, rgb_to_linear_rgb

    return rgb_to_linear_rgb(rgb) if space == "linear_rgb" else rgb_to_lab(rgb)


def to_rgb(colours: Tensor, space: Space) -> Tensor:
    """The inverse of `to_space`; not clipped to [0, 1]."""
    from kornia.color import lab_to_rgb, linear_rgb_to_rgb

    return linear_rgb_to_rgb(colours) if space == "linear_rgb" else lab_to_rgb(colours, clip=False)


def match_pictures(
    pictures: Tensor,
    reference: Tensor,
    mask: Tensor | None = None,
    mask_ref: Tensor | None = None,
    match: ColorMatch | None = None,
    *,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """The pictures with their colours, inside the mask, matched to those of the reference inside its mask.

    Args:
        pictures: (B, H, W, 3 or 4). Strength 0 returns this very tensor.
        reference: (R, h, w, 3 or 4), any size. With frames "each", picture i takes reference i, and the last one
            serves what is left; otherwise all references count together.
        mask: (1 or B, H, W): what is measured and changed; None = everything. An entry of a batch that is empty leaves
            its picture as it is, as an object may leave a video.
        mask_ref: (1 or R, h, w): what of the reference is measured.
        match: how; None = the defaults.
        device: where to compute; None = where the pictures are. The result is where the pictures are.
        progress: called as (pictures done, pictures in all) after each; it may raise to interrupt.

    Returns:
        A tensor like `pictures`; inside the mask in [0, 1], outside bit for bit what it was.

    Raises:
        ValueError: a mask that is empty or of another size, a frame that is not there, no pictures.
    """
    match = match or ColorMatch()
    _require_pictures(pictures, "the image")
    _require_pictures(reference, "the reference")
    _require_mask(mask, pictures, "the mask of the image")
    _require_mask(mask_ref, reference, "the mask of the reference")
    if match.frames == "one" and not 0 <= match.frame < pictures.shape[0]:
        raise ValueError(
            f"frame is {match.frame}, but the batch has {pictures.shape[0]} pictures: allowed are 0 to "
            f"{pictures.shape[0] - 1}"
        )
    if match.strength == 0:
        return pictures
    work = _Work(match, device or pictures.device)
    transport = None if match.frames == "each" else work.common(pictures, reference, mask, mask_ref)
    result = torch.empty_like(pictures)
    for i, picture in enumerate(pictures):
        own = None if mask is None else mask[min(i, mask.shape[0] - 1)]
        here = work.alone(i, picture, reference, own, mask_ref) if match.frames == "each" else transport
        work.change(picture, own, here, result[i])
        if progress is not None:
            progress(i + 1, pictures.shape[0])
    return result


class Swatch(NamedTuple):
    """One colour of a palette, sRGB in [0, 1], and its share of the picture."""

    rgb: tuple[float, float, float]
    share: float


def palette(picture: Tensor, mask: Tensor | None = None, count: int = 6) -> list[Swatch]:
    """The main colours of a picture (H, W, 3 or 4) inside its mask (H, W), largest share first: k-means in CIELAB.

    Fewer than `count` if the picture has fewer colours; none if the mask is empty.
    """
    found = _measured(picture[None], None if mask is None else mask[None], "lab", picture.device, budget=4096)
    if found is None:
        return []
    points, weight = found.values.T, found.weight
    centres = points[weight.argmax()][None]
    for _ in range(count - 1):  # farthest first: the same palette for the same picture
        distance = torch.cdist(points, centres).amin(dim=1)
        if distance.amax() < 2:  # what is closer looks the same
            break
        centres = torch.cat([centres, points[distance.argmax()][None]])
    for _ in range(20):
        nearest = _nearest(points, centres, weight)
        mass = nearest.sum(dim=0)[:, None]
        centres = torch.where(mass > 0, nearest.T @ points / mass.clamp_min(1e-12), centres)
    rgb = to_rgb(centres.T[:, None], "lab")[:, 0].T.clamp(0, 1).tolist()
    shares = (_nearest(points, centres, weight).sum(dim=0) / weight.sum()).tolist()
    swatches = (Swatch((r, g, b), share) for (r, g, b), share in zip(rgb, shares, strict=True) if share > 0)
    return sorted(swatches, key=lambda swatch: -swatch.share)


def _nearest(points: Tensor, centres: Tensor, weight: Tensor) -> Tensor:
    """(N, K): the weight of each point in the column of its nearest centre."""
    return F.one_hot(torch.cdist(points, centres).argmin(dim=1), len(centres)) * weight[:, None]


@dataclass(frozen=True)
class _Work:
    """One call of `match_pictures`: how, and on which device."""

    match: ColorMatch
    device: torch.device

    def common(self, pictures: Tensor, reference: Tensor, mask: Tensor | None, mask_ref: Tensor | None) -> Transport:
        """One map for all pictures."""
        match = self.match
        if match.frames == "one":
            own = None if mask is None else mask[min(match.frame, mask.shape[0] - 1)][None]
            source = self.measured(pictures[match.frame : match.frame + 1], own)
            where = f" in frame {match.frame}"
        else:
            source, where = self.measured(pictures, mask), ""
        return self.fit(source, self.measured(reference, mask_ref), where)

    def alone(
        self, i: int, picture: Tensor, reference: Tensor, mask: Tensor | None, mask_ref: Tensor | None
    ) -> Transport | None:
        """The map of one picture; None if it has nothing to change."""
        source = self.measured(picture[None], None if mask is None else mask[None])
        if source is None:
            return None
        last = min(i, reference.shape[0] - 1)
        own_ref = None if mask_ref is None else mask_ref[min(last, mask_ref.shape[0] - 1)][None]
        return self.fit(source, self.measured(reference[last : last + 1], own_ref), f" in entry {last}")

    def measured(self, pictures: Tensor, mask: Tensor | None) -> Samples | None:
        return _measured(pictures, mask, self.match.space, self.device, SAMPLES)

    def fit(self, source: Samples | None, reference: Samples | None, where: str) -> Transport:
        for name, found in (("image", source), ("reference", reference)):
            if found is None:
                raise ValueError(
                    f"the mask of the {name} selects nothing{where}: paint the region that counts, or disconnect the "
                    "mask to use the whole picture"
                )
        assert source is not None and reference is not None
        eps = COLOUR_EPS * _UNIT[self.match.space]
        return fit_transport(self.match.method, source, reference, eps=eps)

    def change(self, picture: Tensor, mask: Tensor | None, transport: Transport | None, out: Tensor) -> None:
        """Write the changed picture (H, W, 3 or 4) to `out`, piece by piece."""
        if transport is None:
            out.copy_(picture)
            return
        pixels, target = picture.flatten(0, 1), out.flatten(0, 1)
        share = self.share(picture, mask)
        size = _piece(self.device)
        for start in range(0, pixels.shape[0], size):
            piece, result = pixels[start : start + size], target[start : start + size]
            if share is not None and not share[start : start + size].amax() > 0:
                result.copy_(piece)
                continue
            before = _planes(piece, self.device)
            after = self.matched(before, transport).to(before.dtype)
            if share is None:
                after = after if self.match.strength == 1 else torch.lerp(before, after, self.match.strength)
            else:
                weight = share[start : start + size].to(before)
                after = torch.where(weight > 0, torch.lerp(before, after, weight), before)
            for channel in range(3):  # one by one: three times as fast as all at once, transposed
                result[:, channel] = after[channel, 0]
            result[:, 3:] = piece[:, 3:]

    def matched(self, rgb: Tensor, transport: Transport) -> Tensor:
        """Planes (3, 1, N) of sRGB, matched, in [0, 1]."""
        space = self.match.space
        after = to_rgb(transport(to_space(rgb, space)), space)
        if self.match.keep_luminance:
            luminance, chroma = to_space(rgb, "lab")[:1], to_space(after, "lab")[1:]
            after = to_rgb(torch.cat([luminance, chroma]), "lab")
        return after.clamp_(0, 1)

    def share(self, picture: Tensor, mask: Tensor | None) -> Tensor | None:
        """How much of each pixel (H * W,) is changed; None: all of them alike, by `strength`."""
        if mask is not None and self.match.feather > 0:
            mask = feathered(mask.to(self.device), self.match.feather)
        if picture.shape[-1] == 4:
            opaque = (picture[..., 3] > 0).to(self.device, torch.float32)
            mask = opaque if mask is None else mask.to(opaque) * opaque
        return None if mask is None else mask.flatten() * self.match.strength


def feathered(mask: Tensor, width: int) -> Tensor:
    """A mask (H, W) that rises from its edge inwards over about `width` pixels; never more than it was.

    What is narrower than twice the width is reached in part only. The picture's own border is no edge.
    """
    sigma = max(width / 2, 0.5)
    reach = min(max(1, round(2 * sigma)), *(side - 1 for side in mask.shape)) if min(mask.shape) > 1 else 0
    if reach == 0:
        return mask
    side = 2 * reach + 1
    from kornia.filters import gaussian_blur2d

    blurred = gaussian_blur2d(mask.float()[None, None], (side, side), (sigma, sigma), border_type="replicate")[0, 0]
    return mask * (2 * blurred - 1).clamp(0, 1)


def _measured(pictures: Tensor, mask: Tensor | None, space: Space, device: torch.device, budget: int) -> Samples | None:
    """The colours of at most `budget` pixels with weight, each picture giving alike; None if no pixel has any."""
    values, weights = [], []
    quota = max(1, budget // pictures.shape[0])
    for i, picture in enumerate(pictures):
        pixels = picture.flatten(0, 1)
        weight = None if mask is None else mask[min(i, mask.shape[0] - 1)].flatten()
        if picture.shape[-1] == 4:
            weight = pixels[:, 3] if weight is None else weight.to(pixels) * pixels[:, 3]
        places = None if weight is None else (weight > 0).nonzero().flatten()
        total = pixels.shape[0] if places is None else places.numel()
        if total > quota:
            chosen = spread(total, quota, pixels.device if places is None else places.device)
            places = chosen if places is None else places[chosen]
        if places is not None:
            pixels = pixels[places.to(pixels.device)]
            weight = None if weight is None else weight[places.to(weight.device)]
        values.append(_colours(pixels, space, device))
        weights.append(values[-1].new_ones(values[-1].shape[1]) if weight is None else weight.to(values[-1]))
    found = Samples(torch.cat(values, dim=1), torch.cat(weights))
    return found if found.values.shape[1] else None


def _colours(pixels: Tensor, space: Space, device: torch.device) -> Tensor:
    """Pixels (N, 3 or 4) -> their colours (3, N) in the space, converted piece by piece."""
    size = _piece(device)
    colours = torch.empty(3, pixels.shape[0], device=device, dtype=statistics_dtype(pixels.dtype))
    for start in range(0, pixels.shape[0], size):
        planes = _planes(pixels[start : start + size], device)
        colours[:, start : start + size] = to_space(planes, space)[:, 0]
    return colours


def _piece(device: torch.device) -> int:
    """How many pixels are worked on at once: on a processor, as many as fit its cache yet occupy all its threads."""
    if device.type != "cpu":
        return _PIECE_ELSEWHERE
    return max(_PIECE, torch.get_num_threads() * _PIECE_PER_THREAD)


def _planes(pixels: Tensor, device: torch.device) -> Tensor:
    """Pixels (N, 3 or 4) -> planes (3, 1, N), as kornia wants them."""
    colours = pixels[:, :3].to(device, statistics_dtype(pixels.dtype))
    return torch.stack(colours.unbind(1))[:, None]  # twice as fast as `.T.contiguous()`


def _require_pictures(pictures: Tensor, name: str) -> None:
    if pictures.ndim != 4 or pictures.shape[-1] not in (3, 4) or 0 in pictures.shape:
        raise ValueError(
            f"{name} has shape {tuple(pictures.shape)}, but pictures are (count, height, width, 3), or 4 with alpha"
        )


def _require_mask(mask: Tensor | None, pictures: Tensor, name: str) -> None:
    if mask is None:
        return
    count, height, width = pictures.shape[:3]
    if mask.ndim != 3 or mask.shape[0] not in (1, count) or tuple(mask.shape[1:]) != (height, width):
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}, but these pictures need (1 or {count}, {height}, {width}): resize "
            "it or connect the one that belongs to them"
        )
    low, high = mask.amin().item(), mask.amax().item()
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise ValueError(f"{name} holds values from {low} to {high}, allowed are 0 to 1: clamp or rescale the mask")
    if high == 0:
        raise ValueError(
            f"{name} is empty: paint the region that counts (Open in MaskEditor on Load Image), or disconnect the mask "
            "to use the whole picture"
        )
