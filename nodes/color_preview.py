"""What AdaIN Color Match shows: before, after and the reference, each over its palette."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..inversion_core.color import palette

SIDE, BAR, CAPTION, GAP = 256, 40, 16, 8
PAPER, INK = (32, 32, 32), (220, 220, 220)


def preview_sheet(
    before: Tensor, after: Tensor, reference: Tensor, mask: Tensor | None, reference_mask: Tensor | None
) -> Tensor:
    """An IMAGE (1, H, W, 3) with three panels; pictures are (H, W, 3 or 4), masks batches of which the first counts."""
    mask, reference_mask = (None if one is None else one[0] for one in (mask, reference_mask))
    panels = [
        _panel("before", before, mask),
        _panel("after", after, mask),
        _panel("reference", reference, reference_mask),
    ]
    width = sum(panel.width for panel in panels) + GAP * (len(panels) + 1)
    sheet = Image.new("RGB", (width, panels[0].height + 2 * GAP), PAPER)
    left = GAP
    for panel in panels:
        sheet.paste(panel, (left, GAP))
        left += panel.width + GAP
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)[None]


def _panel(caption: str, picture: Tensor, mask: Tensor | None) -> Image.Image:
    """A caption, the picture at most SIDE x SIDE, and the colours inside its mask, as wide as their shares."""
    pixels = (picture[..., :3].float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    panel = Image.new("RGB", (SIDE, CAPTION + SIDE + GAP + BAR), PAPER)
    panel.paste(image, ((SIDE - image.width) // 2, CAPTION + (SIDE - image.height) // 2))
    draw = ImageDraw.Draw(panel)
    draw.text((0, 0), caption, fill=INK)
    top, left = CAPTION + SIDE + GAP, 0.0
    for swatch in palette(picture, mask):
        right = left + swatch.share * SIDE
        colour = tuple(round(255 * channel) for channel in swatch.rgb)
        if round(right) > round(left):
            draw.rectangle((round(left), top, round(right) - 1, top + BAR - 1), fill=colour)
        left = right
    return panel
