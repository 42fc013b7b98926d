"""The curve of a training as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

WIDTH, HEIGHT, MARGIN = 384, 256, 28
PAPER, INK, LINE = (32, 32, 32), (220, 220, 220), (110, 190, 255)


def loss_plot(evaluations: Sequence[tuple[int, float]], total: int, caption: str) -> Image.Image:
    """Losses on fixed noise over the steps, from 0 steps to `total`."""
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((8, 6), caption, fill=INK)
    if not evaluations:
        return image
    low, high = min(loss for _, loss in evaluations), max(loss for _, loss in evaluations)
    span = (high - low) or 1.0
    points = [
        (
            MARGIN + (WIDTH - 2 * MARGIN) * step / max(1, total),
            HEIGHT - MARGIN - (HEIGHT - 3 * MARGIN) * (loss - low) / span,
        )
        for step, loss in evaluations
    ]
    draw.text((8, 2 * MARGIN - 14), f"{high:.4g}", fill=INK)
    draw.text((8, HEIGHT - MARGIN + 4), f"{low:.4g}", fill=INK)
    draw.text((WIDTH - 2 * MARGIN - 20, HEIGHT - MARGIN + 4), f"{total} steps", fill=INK)
    if len(points) > 1:
        draw.line(points, fill=LINE, width=2)
    for x, y in points:
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=LINE)
    return image
