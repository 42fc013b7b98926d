"""A workflow's thumbnail: the pictures that it starts from above what it makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from demo.client import ComfyClient, Outputs
from demo.graph import Graph

GIVEN = ("ShapeAppearanceDemoPicture", "LoadImage")
SAVED, RESULT = "SaveImage", "Result"
SIDE = 512
"""The template browser shows squares."""
_GAP, _CAPTION = 12, 22
_MOST = 4
_PAPER, _INK = (32, 32, 32), (225, 225, 225)


def thumbnail(graph: Graph, client: ComfyClient, outputs: Outputs) -> Image.Image:
    """Draw it from a run's own pictures: inputs in a row, each with its node's title, and the results below."""
    given, results = [], []
    for node_id, node in graph.items():
        title = node.get("_meta", {}).get("title", node["class_type"])
        pictures = [(title, picture.convert("RGB")) for picture in client.fetch_images(outputs, node_id)]
        if node["class_type"] in GIVEN:
            given += pictures
        elif node["class_type"] == SAVED and title.startswith(RESULT):
            results += [(name.removeprefix(f"{RESULT}: "), picture) for name, picture in pictures]
    return drawn(given, results)


def drawn(given: Sequence[tuple[str, Image.Image]], results: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Rows of titled pictures on a square: what is given on a third of the height, and below it what is made of it,
    at most four in a row."""
    canvas = Image.new("RGB", (SIDE, SIDE), _PAPER)
    rows = math.ceil(len(results) / _MOST)
    end = upper = _row(canvas, given, 0, 150 if rows < 2 else 120)
    for i in range(rows):
        most = (SIDE - upper - _GAP) // rows - _CAPTION
        part = results[i * _MOST : (i + 1) * _MOST]
        end = _row(canvas, part, end, most, len(part) if rows == 1 else _MOST)
    centred = Image.new("RGB", (SIDE, SIDE), _PAPER)
    centred.paste(canvas, (0, (SIDE - end) // 2))
    return centred


def _row(
    canvas: Image.Image, pictures: Sequence[tuple[str, Image.Image]], top: int, most: int, columns: int = 0
) -> int:
    """Draws pictures side by side in the middle, as large as fits so many; returns where the row ends."""
    if not pictures:
        return top
    columns = columns or len(pictures)
    side = min(most, (SIDE - _GAP * (columns + 1)) // columns)
    left = (SIDE - len(pictures) * side - (len(pictures) - 1) * _GAP) // 2
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for title, picture in pictures:
        fitted = picture.resize((side, round(side * picture.height / picture.width)), Image.Resampling.LANCZOS)
        if fitted.height > side:
            fitted = picture.resize((round(side * picture.width / picture.height), side), Image.Resampling.LANCZOS)
        draw.text((left + side / 2, top + _CAPTION / 2 + 4), title, fill=_INK, font=font, anchor="mm")
        canvas.paste(fitted, (left + (side - fitted.width) // 2, top + _CAPTION + 4))
        left += side + _GAP
    return top + _CAPTION + 4 + side + 4
