"""Pictures of many results: a sheet of all methods that were asked for, and the pages that the README shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_PANEL = 128
_GAP = 6
_HEAD = 34


@dataclass(frozen=True)
class Page:
    """A page of the README.

    Attributes:
        given: what the methods were given, by title: attributes of `Pair`, with ``.image`` where it is rendered.
        truth: the true answer's attribute.
        methods: by title.
        first: the first of its pairs, counted from the first judged one.
    """

    given: dict[str, str]
    truth: str
    methods: dict[str, str]
    first: int


PAIRS = 7
"""On a page."""
PAGES = {
    "page-composition": Page(
        {"A: shape": "shape", "B: appearance": "appearance"},
        "truth",
        {
            "prompt only": "prompt only",
            "img2img (0.6)\nfrom A, B in words": "img2img 0.6",
            "MasaCtrl": "masactrl",
            "StyleID": "style-id",
            "Cross-Image\nAttention": "cross-image",
            "KV Injection,\ndefault": "default + flat shape",
        },
        0,
    ),
    "page-placed": Page(
        {"A: shape": "shape", "B: appearance": "appearance", "C: place": "place"},
        "placed_truth",
        {"Cross-Image\nAttention": "cross-image on C", "KV Injection,\ndefault": "default on C"},
        PAIRS,
    ),
}
"""By the name of its file."""


def sheet(titles: list[str], rows: list[list[np.ndarray]]) -> Image.Image:
    """A grid of pictures (H, W, 3), one column for each title."""
    width = _GAP + len(titles) * (_PANEL + _GAP)
    made = Image.new("RGB", (width, _HEAD + len(rows) * (_PANEL + _GAP)), "white")
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(size=12)
    for column, title in enumerate(titles):
        left = _GAP + column * (_PANEL + _GAP)
        words = title if len(title) <= 20 or "\n" in title else title.replace(" + ", "\n+ ").replace(" (", "\n(")
        draw.multiline_text((left + _PANEL / 2, _HEAD / 2), words, fill="black", font=font, anchor="mm", align="center")
        for row, pictures in enumerate(rows):
            pixels = np.uint8(np.round(np.clip(pictures[column], 0, 1) * 255))
            made.paste(Image.fromarray(pixels), (left, _HEAD + row * (_PANEL + _GAP)))
    return made
