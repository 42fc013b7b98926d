"""Pictures and masks in the size that is learned at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import LearningError

CELL = 64
"""Sides of training pictures are multiples of this where they are large enough: 8 pixels a latent cell, and as many
cells as a UNet halves evenly."""


def fitted(pictures: Tensor, masks: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Pictures (B, H, W, 3) and masks (B, H, W) reduced to at most `size` on a side, cut at the centre to even sides.
    Nothing is enlarged.

    Raises:
        LearningError: too little is left to learn from.
    """
    height, width = pictures.shape[1:3]
    scale = min(1.0, size / max(height, width, 1))
    sides = [round(side * scale) for side in (height, width)]
    cut = [side - side % (CELL if side >= CELL else 8) for side in sides]
    if min(cut) == 0:
        raise LearningError(
            f"the picture is {width}x{height} pixels, {sides[1]}x{sides[0]} at size {size}, but 8x8 is the least that "
            "can be learned from: take a larger picture, or crop it closer to a square"
        )
    both = torch.cat([pictures, masks[..., None]], dim=3).permute(0, 3, 1, 2)
    if scale < 1:
        both = F.interpolate(both, size=sides, mode="area")
    top, left = ((side - kept) // 2 for side, kept in zip(sides, cut, strict=True))
    both = both[:, :, top : top + cut[0], left : left + cut[1]].permute(0, 2, 3, 1).clamp(0, 1)
    return both[..., :3].contiguous(), both[..., 3].contiguous()
