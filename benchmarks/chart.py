"""Curves as a picture, with nothing but Pillow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE = (800, 360)
LEFT, TOP, RIGHT, BOTTOM = 56, 16, 616, 312
COLOURS = ("#d1495b", "#00798c", "#edae49", "#5b5f97", "#66a182", "#8d6a9f")

Curve = Sequence[tuple[float, float]]


def chart(curves: Mapping[str, Curve], ticks: Mapping[float, str], across: str, up: str, top: float) -> Image.Image:
    """Curves over one another.

    Args:
        curves: points (x, y) by name; y from 0 to `top`.
        ticks: what is written at which x. They span the picture.
        across, up: what the axes mean.
        top: largest y.
    """
    image = Image.new("RGB", SIZE, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    first, last = min(ticks), max(ticks)

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + (RIGHT - LEFT) * (x - first) / (last - first), BOTTOM - (BOTTOM - TOP) * y / top

    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = at(first, share * top)
        draw.line([(x, y), at(last, share * top)], fill="#dddddd")
        draw.text((x - 6, y), f"{share * top:.2g}", fill="#444444", font=font, anchor="rm")
    for x, label in ticks.items():
        draw.text((at(x, 0)[0], BOTTOM + 6), label, fill="#444444", font=font, anchor="mt")
    draw.text(((LEFT + RIGHT) / 2, SIZE[1] - 8), across, fill="black", font=font, anchor="mb")
    draw.text((LEFT + 6, TOP - 2), up, fill="black", font=font, anchor="lt")
    for i, points in enumerate(curves.values()):
        colour = COLOURS[i % len(COLOURS)]
        places = [at(x, y) for x, y in sorted(points)]
        draw.line(places, fill=colour, width=2)
        for x, y in places:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
    for i, name in enumerate(curves):
        colour, line = COLOURS[i % len(COLOURS)], TOP + 15 * i
        draw.line([(RIGHT + 24, line + 6), (RIGHT + 42, line + 6)], fill=colour, width=3)
        draw.text((RIGHT + 48, line), name, fill="black", font=font, anchor="lt")
    return image
