"""Draws the pack's icon and banner for the registry: the shape of one picture, the appearance of another.

    .venv/bin/python scripts/artwork.py

They lie in docs/images, where `pyproject.toml` points to.
"""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
ICON_SIDE = 400
"""The registry takes icons of 800x400 at most."""
BANNER_SIZE = (1260, 540)
"""The registry's banners are 21:9."""
SMOOTH = 4
"""Everything is drawn this many times larger, and then reduced: Pillow's polygons have hard edges."""

INK, PAPER, QUIET = (28, 30, 48), (246, 243, 236), (196, 192, 184)
RED, GOLD = (214, 62, 58), (250, 196, 84)


def heart(side: int) -> Image.Image:
    """A mask, L, of a heart that fills four fifths of a square."""
    points = []
    for step in range(360):
        t = math.radians(step)
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((side * (0.5 + x * 0.025), side * (0.47 - y * 0.025)))
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon(points, fill=255)
    return mask


def disc(side: int) -> Image.Image:
    """A mask, L, of a disc that fills three quarters of a square."""
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).ellipse([side * 0.125, side * 0.125, side * 0.875, side * 0.875], fill=255)
    return mask


def stripes(side: int) -> Image.Image:
    """Slanted stripes of two colours."""
    drawn = Image.new("RGB", (side, side), RED)
    draw = ImageDraw.Draw(drawn)
    width = side / 12
    for index in range(-12, 24, 2):
        left = index * width
        draw.polygon([(left, side), (left + width, side), (left + width + side, 0), (left + side, 0)], fill=GOLD)
    return drawn


def picture(side: int, mask: Image.Image, inside: Image.Image | tuple[int, int, int]) -> Image.Image:
    """A square of paper with something in a mask."""
    drawn = Image.new("RGB", (side, side), PAPER)
    filling = inside if isinstance(inside, Image.Image) else Image.new("RGB", (side, side), inside)
    drawn.paste(filling, (0, 0), mask)
    return drawn


def icon() -> Image.Image:
    """The result alone."""
    side = ICON_SIDE * SMOOTH
    drawn = Image.new("RGBA", (side, side))
    plate = Image.new("L", (side, side))
    ImageDraw.Draw(plate).rounded_rectangle([0, 0, side - 1, side - 1], radius=side * 0.18, fill=255)
    drawn.paste(picture(side, heart(side), stripes(side)), (0, 0), plate)
    return drawn.resize((ICON_SIDE, ICON_SIDE), Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    """Shape + appearance = result, with the pack's name below."""
    width, height = (side * SMOOTH for side in BANNER_SIZE)
    tile, gap = height * 5 // 11, width // 12
    drawn = Image.new("RGB", (width, height), INK)
    draw = ImageDraw.Draw(drawn)
    left, top = (width - 3 * tile - 2 * gap) // 2, height // 8
    parts = (
        picture(tile, heart(tile), QUIET),
        picture(tile, disc(tile), stripes(tile)),
        picture(tile, heart(tile), stripes(tile)),
    )
    for index, part in enumerate(parts):
        drawn.paste(part, (left + index * (tile + gap), top))
    arm, line = gap // 5, gap // 12
    across = top + tile // 2
    plus, equal = (left + tile + gap // 2 + index * (tile + gap) for index in range(2))
    draw.line([(plus - arm, across), (plus + arm, across)], fill=PAPER, width=line)
    draw.line([(plus, across - arm), (plus, across + arm)], fill=PAPER, width=line)
    for offset in (-line, line):
        draw.line([(equal - arm, across + offset), (equal + arm, across + offset)], fill=PAPER, width=line)
    font = ImageFont.load_default(height // 8)
    draw.text((width // 2, top + tile + height // 5), "Shape & Appearance", fill=PAPER, font=font, anchor="mm")
    return drawn.resize(BANNER_SIZE, Image.Resampling.LANCZOS)


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, drawn in (("icon", icon()), ("banner", banner())):
        path = IMAGES / f"{name}.png"
        drawn.save(path, optimize=True)
        print(f"{path}: {drawn.width}x{drawn.height}, {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
