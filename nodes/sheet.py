"""Sheets of captioned pictures, drawn for an artist's eye."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIDE, CAPTION, GAP = 320, 24, 10
PAPER, INK = (32, 32, 32), (225, 225, 225)
_RAMP = ((0.05, 0.03, 0.20), (0.35, 0.06, 0.43), (0.74, 0.21, 0.33), (0.97, 0.55, 0.04), (0.99, 1.0, 0.64))
"""Dark to bright, by equal steps of lightness, so that it also reads in grey."""


class Panel(NamedTuple):
    """A caption over a picture (H, W, 3) in [0, 1], shown at most SIDE x SIDE."""

    caption: str
    picture: Tensor


def sheet(rows: Sequence[Sequence[Panel]]) -> Tensor:
    """An IMAGE (1, H, W, 3) with rows of panels."""
    columns = max(len(row) for row in rows)
    size = (GAP + columns * (SIDE + GAP), GAP + len(rows) * (CAPTION + SIDE + GAP))
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            left, top = GAP + j * (SIDE + GAP), GAP + i * (CAPTION + SIDE + GAP)
            draw.text((left, top), panel.caption, fill=INK, font=ImageFont.load_default(15))
            image = _fitted(panel.picture)
            canvas.paste(image, (left + (SIDE - image.width) // 2, top + CAPTION + (SIDE - image.height) // 2))
    return _tensor(canvas)


def table(title: str, rows: Sequence[tuple[str, str, str]]) -> Tensor:
    """An IMAGE (1, H, W, 3) with lines of name, value and remark under a title."""
    widths, line = (250, 110, 480), 30
    canvas = Image.new("RGB", (sum(widths) + 2 * GAP, line * (len(rows) + 1) + 3 * GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, GAP), title, fill=INK, font=ImageFont.load_default(18))
    for i, row in enumerate(rows):
        left, top = GAP, 2 * GAP + line * (i + 1)
        for text, width in zip(row, widths, strict=True):
            draw.text((left, top), text, fill=INK, font=ImageFont.load_default(16))
            left += width
    return _tensor(canvas)


def heat(values: Tensor, low: float, high: float) -> Tensor:
    """(H, W) -> (H, W, 3): low dark, high bright."""
    ramp = values.new_tensor(_RAMP)
    place = ((values - low) / max(high - low, 1e-12)).clamp(0, 1) * (len(_RAMP) - 1)
    below = place.floor().clamp_max(len(_RAMP) - 2)
    return torch.lerp(ramp[below.long()], ramp[below.long() + 1], (place - below)[..., None])


def overlaid(picture: Tensor, colours: Tensor, share: float = 0.85) -> Tensor:
    """Colours (h, w, 3), one for each cell, laid over the grey of a picture (H, W, 3) at the picture's size."""
    height, width = picture.shape[:2]
    cells = torch.nn.functional.interpolate(colours.movedim(-1, 0)[None], size=(height, width), mode="nearest-exact")
    grey = picture.mean(-1, keepdim=True).expand(-1, -1, 3)
    return torch.lerp(grey, cells[0].movedim(0, -1), share)


def marked(picture: Tensor, x: float, y: float) -> Tensor:
    """A picture with a cross at a place given in shares of its width and height."""
    image = _image(picture)
    draw = ImageDraw.Draw(image)
    reach, thick = max(image.size) / 25, max(1, round(max(image.size) / 150))
    left, top = x * image.width, y * image.height
    for colour, extra in (((0, 0, 0), 2 * thick), ((255, 255, 255), 0)):
        draw.line((left - reach, top, left + reach, top), fill=colour, width=thick + extra)
        draw.line((left, top - reach, left, top + reach), fill=colour, width=thick + extra)
    return _tensor(image)[0]


def _fitted(picture: Tensor) -> Image.Image:
    image = _image(picture)
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _image(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture.float().clamp(0, 1) * 255).round().byte().cpu().numpy())


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]
