"""A sheet of pictures: one column for each method, one row for each pair."""

from __future__ import annotations

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_PANEL = 128
_GAP = 6
_LINE = 16


def sheet(titles: list[str], rows: list[list[np.ndarray]]) -> Image.Image:
    """A grid of pictures (H, W, 3), one column for each title."""
    width = _GAP + len(titles) * (_PANEL + _GAP)
    heads = [title if "\n" in title else textwrap.fill(title, 20) for title in titles]
    head = _GAP + _LINE * max(1 + words.count("\n") for words in heads)
    made = Image.new("RGB", (width, head + len(rows) * (_PANEL + _GAP)), "white")
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(size=12)
    for column, words in enumerate(heads):
        left = _GAP + column * (_PANEL + _GAP)
        draw.multiline_text((left + _PANEL / 2, head / 2), words, fill="black", font=font, anchor="mm", align="center")
        for row, pictures in enumerate(rows):
            pixels = np.uint8(np.round(np.clip(pictures[column], 0, 1) * 255))
            made.paste(Image.fromarray(pixels), (left, head + row * (_PANEL + _GAP)))
    return made
