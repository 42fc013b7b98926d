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
FILLED = 0.75
"""Share of the frame that the longer side of a shape takes, as far as `ZOOM` allows."""
ZOOM = 0.7, 2.0
WHOLE = 0.995
"""Share of a square that must lie on the object for it to be tiled, if any such square is there."""
TEXTURES = ("plain", "striped", "dotted", "checkered", "ringed", "shaded")


class Variant(NamedTuple):
    """A picture to learn from and the words for what is not to be learned ("" if there are none)."""

    picture: Tensor
    mask: Tensor
    words: str


def with_new_surface(picture: Tensor, mask: Tensor, rng: np.random.Generator, *, centred: bool = True) -> Variant:
    """For a shape: the object painted anew, on a new background.

    Of the object's own light and dark a quarter of the variants keep a random share, at most 0.3: enough that inner
    forms can be learned, too little for a texture.

    Args:
        centred: whether the object is brought to the middle, at one size, which is where models draw what they are
            asked for, and turned a little. Otherwise it stays as it is in the picture.
    """
    if centred:
        picture, mask = _centred(picture, mask, rng)
    paint, words = _paint(rng, picture.shape[1:], _centre(mask))
    if rng.random() < 0.25:
        light = picture.mean(0, keepdim=True)
        level = (light * mask).sum() / mask.sum().clamp(min=1e-6)
        paint = (paint + rng.uniform(0, 0.3) * (light - level)).clamp(0, 1)
    return Variant(_over(paint, mask, _background(rng, picture.shape[1:])), mask, words)


def with_new_geometry(picture: Tensor, mask: Tensor, rng: np.random.Generator) -> Variant:
    """For an appearance: the object warped beyond recognition, or a square of it tiled inside a new outline."""
    if rng.random() < 0.5:
        picture, mask = _warped(picture, mask, rng)
    else:
        picture, mask = _tiled(picture, mask, rng), _blob(rng, picture.shape[1:])
    return Variant(_over(picture, mask, _background(rng, picture.shape[1:])), mask, "")


# --- painting ---------------------------------------------------------------------------------------------------------


def _paint(rng: np.random.Generator, size: torch.Size, centre: tuple[float, float]) -> tuple[Tensor, str]:
    """A surface (3, H, W) in two tones of one colour about a place, and its words, such as "red striped"."""
    colour, texture = str(rng.choice(list(COLOURS))), str(rng.choice(TEXTURES))
    tone = (torch.tensor(COLOURS[colour]) + _uniform(rng, -0.04, 0.04, 3)).clamp(0, 1)
    second = tone + (1 - tone) * rng.uniform(0.5, 0.65) if rng.random() < 0.5 else tone * rng.uniform(0.35, 0.5)
    y, x = (place - middle for place, middle in zip(_places(size), centre, strict=True))
    angle, period = rng.uniform(0, math.pi), rng.uniform(0.15, 0.22)
    if texture == "checkered":
        period *= 1.6
    phase = rng.random()
    u = (x * math.cos(angle) + y * math.sin(angle)) / period + phase
    v = (y * math.cos(angle) - x * math.sin(angle)) / period + rng.random()
    wave_u, wave_v = torch.sin(2 * math.pi * u), torch.sin(2 * math.pi * v)
    level = {
        "plain": torch.full_like(u, -1.0),
        "striped": wave_u,
        "checkered": wave_u * wave_v,
        "dotted": wave_u + wave_v - 0.6,
        "ringed": torch.sin(2 * math.pi * (torch.hypot(x, y) / period + phase)),
        "shaded": (x * math.cos(angle) + y * math.sin(angle)) / 2,
    }[texture]
    share = torch.sigmoid(level * 12)
    return tone[:, None, None] + (second - tone)[:, None, None] * share, f"{colour} {texture}"


def _background(rng: np.random.Generator, size: torch.Size) -> Tensor:
    """Muted, plain or a vertical gradient. No words say it: a prompt's own background shall mean what it always did."""
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


def _covered(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and the columns, in order, in which there is something of the object."""
    inside = mask[0] > 0.5
    return torch.nonzero(inside.any(1)).flatten(), torch.nonzero(inside.any(0)).flatten()


def _framing(mask: Tensor) -> tuple[float, Tensor]:
    """How much larger the object must become to fill `FILLED` of the frame, and its middle (x, y) in [-1, 1]."""
    _, height, width = mask.shape
    rows, columns = _covered(mask)
    ends = [(float(found[0]) / size, float(found[-1] + 1) / size) for found, size in ((columns, width), (rows, height))]
    extent = max(high - low for low, high in ends)
    middle = torch.tensor([low + high - 1 for low, high in ends])
    return min(max(FILLED / extent, ZOOM[0]), ZOOM[1]), middle


def _centred(picture: Tensor, mask: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The object in the middle, a little turned, moved and scaled."""
    theta = _similarity(rng, scale=(0.93, 1.07), shift=0.03, angle=0.1)
    zoom, centre = _framing(mask)
    theta = torch.cat([theta[:, :, :2] / zoom, theta[:, :, 2:] / zoom + centre[None, :, None]], dim=2)
    return _moved(picture, theta, "reflection"), _moved(mask, theta, "zeros")


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
    theta = _similarity(rng, scale=(0.8, 1.3), shift=0.05, angle=math.pi / 4)
    grid = F.affine_grid(theta, [1, *both.shape], align_corners=False)
    bends = _normal(rng, 1, 2, 5, 5) * rng.uniform(0.03, 0.12)
    grid = grid + F.interpolate(bends, size=both.shape[1:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    moved = F.grid_sample(both[None], grid, padding_mode="zeros", align_corners=False)[0].clamp(0, 1)
    if float(moved[3].sum()) < 0.2 * float(mask.sum()):
        return both[:3], both[3:]
    # Zeros crept in along the frame; they are outside the moved mask.
    return moved[:3], moved[3:]


def _tiled(picture: Tensor, mask: Tensor, rng: np.random.Generator) -> Tensor:
    """A whole frame (3, H, W) of one square from inside the mask, flipped and turned at random and mirrored on and on:
    the surface keeps its scale and its edges, and says nothing of where it lay."""
    _, height, width = picture.shape
    rows, columns = _covered(mask)
    if rows.numel() == 0:
        return picture
    extent = min(int(rows[-1] - rows[0]), int(columns[-1] - columns[0])) + 1
    side = max(4, min(round(extent * rng.uniform(0.35, 0.7)), height, width))
    covered = F.avg_pool2d(mask[None], side, stride=1)[0, 0]
    while float(covered.max()) < WHOLE and side > 4:
        side = max(4, side * 9 // 10)
        covered = F.avg_pool2d(mask[None], side, stride=1)[0, 0]
    good = torch.nonzero(covered >= min(WHOLE, float(covered.max())))
    y, x = (int(at) for at in good[int(rng.integers(len(good)))])
    mean = (picture * mask).flatten(1).sum(1) / mask.sum()
    filled = _over(picture, mask, mean[:, None, None])
    tile = filled[:, y : y + side, x : x + side].rot90(int(rng.integers(4)), (1, 2))
    pair = torch.cat([tile, tile.flip(2)], dim=2)
    period = torch.cat([pair, pair.flip(1)], dim=1)
    down, across = (int(start) for start in rng.integers(2 * side, size=2))
    every_row = (torch.arange(height) + down) % (2 * side)
    every_column = (torch.arange(width) + across) % (2 * side)
    return period[:, every_row][:, :, every_column]


def _blob(rng: np.random.Generator, size: torch.Size) -> Tensor:
    """A random smooth outline about as large as an object is in a picture: (1, H, W)."""
    y, x = _places(size)
    centre_y, centre_x = rng.uniform(0.42, 0.58, 2)
    radius, angle = torch.hypot(x - centre_x, y - centre_y), torch.atan2(y - centre_y, x - centre_x)
    edge = torch.full_like(radius, rng.uniform(0.28, 0.4))
    for waves in range(2, 6):
        edge = edge * (1 + rng.uniform(0, 0.2) / waves * torch.cos(waves * angle + rng.uniform(0, 2 * math.pi)))
    return torch.sigmoid((edge - radius) * 4 * max(size))[None]


def _centre(mask: Tensor) -> tuple[float, float]:
    """Row and column of the middle of what a mask shows, as shares of the picture's sides."""
    y, x = _places(mask.shape[1:])
    weight = mask[0] / mask.sum().clamp(min=1e-6)
    return float((y * weight).sum()), float((x * weight).sum())


def _places(size: torch.Size) -> tuple[Tensor, Tensor]:
    """Rows and columns (H, W) of pixel centres, as shares of the picture's sides."""
    y, x = ((torch.arange(n, dtype=torch.float32) + 0.5) / n for n in size)
    return torch.meshgrid(y, x, indexing="ij")  # pyright: ignore[reportReturnType]


def _uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.from_numpy(rng.uniform(low, high, shape)).float()


def _normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).float()
