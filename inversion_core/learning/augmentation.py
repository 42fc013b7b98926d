"""Variants of a picture in which only what is to be learned stays the same.

For a shape the textures and colours inside the mask and the background are drawn anew; for an appearance the geometry
is destroyed. Each variant is a function of its generator. Pictures are (3, H, W), masks (1, H, W), both in [0, 1].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.84, 0.10, 0.12),
    "orange": (0.96, 0.52, 0.08),
    "yellow": (0.96, 0.87, 0.12),
    "green": (0.12, 0.58, 0.18),
    "cyan": (0.10, 0.78, 0.82),
    "blue": (0.12, 0.22, 0.82),
    "purple": (0.52, 0.16, 0.68),
    "pink": (0.97, 0.48, 0.74),
}
"""Words every text encoder knows, so that the prompt can say what was painted and the token need not."""
TEXTURES = ("plain", "striped", "dotted", "checkered", "ringed", "shaded")


class Variant(NamedTuple):
    """A picture to learn from and the words for what is not to be learned ("" if there are none)."""

    picture: Tensor
    mask: Tensor
    words: str


def with_new_surface(picture: Tensor, mask: Tensor, rng: np.random.Generator) -> Variant:
    """For a shape: the object moved, scaled and turned a little, painted anew, on a new background.

    Of the object's own light and dark a random share, at most half, is kept: none of it in half of the variants, so
    that texture cannot be learned, some in the others, so that inner forms can.
    """
    theta = _similarity(rng, scale=(0.93, 1.07), shift=0.03, angle=0.1)
    picture, mask = _moved(picture, theta, "reflection"), _moved(mask, theta, "zeros")
    paint, words = _paint(rng, picture.shape[1:])
    if rng.random() < 0.5:
        light = picture.mean(0, keepdim=True)
        level = (light * mask).sum() / mask.sum().clamp(min=1e-6)
        paint = (paint + rng.uniform(0, 0.5) * (light - level)).clamp(0, 1)
    return Variant(_over(paint, mask, _background(rng, picture.shape[1:])), mask, words)


def with_new_geometry(picture: Tensor, mask: Tensor, rng: np.random.Generator) -> Variant:
    """For an appearance: the object warped beyond recognition, or its patches shuffled inside a new outline."""
    if rng.random() < 0.5:
        picture, mask = _warped(picture, mask, rng)
    else:
        picture, mask = _shuffled(picture, mask, rng), _blob(rng, picture.shape[1:])
    return Variant(_over(picture, mask, _background(rng, picture.shape[1:])), mask, "")


# --- painting ---------------------------------------------------------------------------------------------------------


def _paint(rng: np.random.Generator, size: torch.Size) -> tuple[Tensor, str]:
    """A surface (3, H, W) in two tones of one colour, and its words, such as "red striped"."""
    colour, texture = str(rng.choice(list(COLOURS))), str(rng.choice(TEXTURES))
    tone = (torch.tensor(COLOURS[colour]) + _uniform(rng, -0.04, 0.04, 3)).clamp(0, 1)
    second = tone + (1 - tone) * rng.uniform(0.5, 0.65) if rng.random() < 0.5 else tone * rng.uniform(0.35, 0.5)
    y, x = _places(size)
    angle, period = rng.uniform(0, math.pi), rng.uniform(0.14, 0.3)
    phase = rng.random()
    u = (x * math.cos(angle) + y * math.sin(angle)) / period + phase
    v = (y * math.cos(angle) - x * math.sin(angle)) / period + rng.random()
    wave_u, wave_v = torch.sin(2 * math.pi * u), torch.sin(2 * math.pi * v)
    level = {
        "plain": torch.full_like(u, -1.0),
        "striped": wave_u,
        "checkered": wave_u * wave_v,
        "dotted": wave_u + wave_v - 0.6,
        "ringed": torch.sin(2 * math.pi * (torch.hypot(x - 0.5, y - 0.5) / period + phase)),
        "shaded": (u - u.mean()) * period / 4,
    }[texture]
    share = torch.sigmoid(level * 12)
    return tone[:, None, None] + (second - tone)[:, None, None] * share, f"{colour} {texture}"


def _background(rng: np.random.Generator, size: torch.Size) -> Tensor:
    """Muted, plain or a vertical gradient."""
    top = _uniform(rng, 0.05, 0.95, 1) + _uniform(rng, -0.15, 0.15, 3)
    bottom = top if rng.random() < 0.5 else _uniform(rng, 0.05, 0.95, 1) + _uniform(rng, -0.15, 0.15, 3)
    y, _ = _places(size)
    return (top[:, None, None] + (bottom - top)[:, None, None] * y).clamp(0, 1)


def _over(front: Tensor, mask: Tensor, back: Tensor) -> Tensor:
    return front * mask + back * (1 - mask)


# --- geometry ---------------------------------------------------------------------------------------------------------


def _similarity(rng: np.random.Generator, scale: tuple[float, float], shift: float, angle: float) -> Tensor:
    """A random map (1, 2, 3) for `affine_grid`."""
    turn, zoom = rng.uniform(-angle, angle), 1 / rng.uniform(*scale)
    cos, sin = math.cos(turn) * zoom, math.sin(turn) * zoom
    dx, dy = rng.uniform(-2 * shift, 2 * shift, 2)
    return torch.tensor([[[cos, -sin, dx], [sin, cos, dy]]], dtype=torch.float32)


def _moved(image: Tensor, theta: Tensor, padding: str) -> Tensor:
    grid = F.affine_grid(theta, [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, padding_mode=padding, align_corners=False)[0].clamp(0, 1)


def _warped(picture: Tensor, mask: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Flipped, turned by quarters, scaled and elastically warped; where the object left the frame, what remains."""
    both = torch.cat([picture, mask])
    if rng.random() < 0.5:
        both = both.flip(2)
    if both.shape[1] == both.shape[2]:
        both = both.rot90(int(rng.integers(4)), (1, 2))
    theta = _similarity(rng, scale=(0.8, 1.5), shift=0.05, angle=math.pi / 4)
    grid = F.affine_grid(theta, [1, *both.shape], align_corners=False)
    bends = _normal(rng, 1, 2, 5, 5) * rng.uniform(0.1, 0.25)
    grid = grid + F.interpolate(bends, size=both.shape[1:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    moved = F.grid_sample(both[None], grid, padding_mode="zeros", align_corners=False)[0].clamp(0, 1)
    if float(moved[3].sum()) < 0.2 * float(mask.sum()):
        return both[:3], both[3:]
    # Zeros crept in along the frame; they are outside the moved mask.
    return moved[:3], moved[3:]


def _shuffled(picture: Tensor, mask: Tensor, rng: np.random.Generator) -> Tensor:
    """A whole frame of overlapping patches from inside the mask, each flipped and turned at random."""
    _, height, width = picture.shape
    inside = mask[0] > 0.5
    rows, columns = (torch.nonzero(inside.any(dim)).flatten() for dim in (1, 0))
    if rows.numel() == 0:
        return picture
    extent = min(int(rows[-1] - rows[0]), int(columns[-1] - columns[0])) + 1
    side = max(4, min(round(extent * rng.uniform(0.3, 0.6)), height, width))
    covered = F.avg_pool2d(mask[None], side, stride=1)[0, 0]
    good = torch.nonzero(covered >= min(0.9, float(covered.max())))
    ramp = 1 - (torch.arange(side) + 0.5 - side / 2).abs() / (side / 2)
    feather = (ramp[:, None] * ramp[None]).clamp(min=1e-3)
    step = max(1, side // 2)
    canvas, weights = torch.zeros(3, height + side, width + side), torch.full((1, height + side, width + side), 1e-6)
    for top in range(0, height, step):
        for left in range(0, width, step):
            y, x = (int(at) for at in good[int(rng.integers(len(good)))])
            patch = torch.cat([picture, mask])[:, y : y + side, x : x + side]
            patch = patch.flip(2) if rng.random() < 0.5 else patch
            patch = patch.rot90(int(rng.integers(4)), (1, 2))
            weight = feather * patch[3:]
            canvas[:, top : top + side, left : left + side] += patch[:3] * weight
            weights[:, top : top + side, left : left + side] += weight
    start = step
    mean = (picture * mask).flatten(1).sum(1) / mask.sum()
    full = (canvas + 1e-6 * mean[:, None, None]) / weights
    return full[:, start : start + height, start : start + width].clamp(0, 1)


def _blob(rng: np.random.Generator, size: torch.Size) -> Tensor:
    """A random smooth outline about as large as an object is in a picture: (1, H, W)."""
    y, x = _places(size)
    centre_y, centre_x = rng.uniform(0.42, 0.58, 2)
    radius, angle = torch.hypot(x - centre_x, y - centre_y), torch.atan2(y - centre_y, x - centre_x)
    edge = torch.full_like(radius, rng.uniform(0.28, 0.4))
    for waves in range(2, 6):
        edge = edge * (1 + rng.uniform(0, 0.2) / waves * torch.cos(waves * angle + rng.uniform(0, 2 * math.pi)))
    return torch.sigmoid((edge - radius) * max(size))[None]


def _places(size: torch.Size) -> tuple[Tensor, Tensor]:
    """Rows and columns (H, W) of pixel centres, as shares of the picture's sides."""
    y, x = ((torch.arange(n, dtype=torch.float32) + 0.5) / n for n in size)
    return torch.meshgrid(y, x, indexing="ij")  # pyright: ignore[reportReturnType]


def _uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.from_numpy(rng.uniform(low, high, shape)).float()


def _normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).float()
