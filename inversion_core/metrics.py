"""What composition is measured by: where the shape is, and how close the appearance came."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PATCHES = ((5, 1), (5, 2), (5, 4))
"""Side of a patch in pixels, and how many times the picture is shrunk before patches are cut: detail to layout."""
DIRECTIONS = 128
QUANTILES = 129


def mask_iou(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two masks (H, W), each thresholded at 0.5; 1 if both are empty."""
    a, b = a > 0.5, b > 0.5
    union = (a | b).sum()
    return float((a & b).sum() / union) if union > 0 else 1.0


def appearance_distance(a: Tensor, b: Tensor, mask_a: Tensor, mask_b: Tensor) -> float:
    """Sliced Wasserstein-1 distance between the patches of two pictures inside their masks (0 = same patches).

    Patches are compared as sets, at three scales: where in the object a colour sits does not matter, which colours
    lie side by side does (after Rabin et al. 2011, "Wasserstein Barycenter and Its Application to Texture Mixing").

    Args:
        a, b: pictures (3, H, W) in [0, 1]; their sizes may differ.
        mask_a, mask_b: (H, W) in [0, 1] for each.

    Raises:
        ValueError: a mask is empty.
    """
    total = 0.0
    for side, shrink in PATCHES:
        first, second = _patches(a, mask_a, side, shrink), _patches(b, mask_b, side, shrink)
        generator = torch.Generator().manual_seed(side * 100 + shrink)
        directions = torch.randn(first.shape[1], DIRECTIONS, generator=generator)
        directions = directions / directions.norm(dim=0)
        levels = torch.linspace(0, 1, QUANTILES)
        gap = torch.quantile(first @ directions, levels, dim=0) - torch.quantile(second @ directions, levels, dim=0)
        total += float(gap.abs().mean())
    return total / len(PATCHES)


def appearance_score(result: Tensor, truth: Tensor, source: Tensor, mask: Tensor) -> float:
    """How far a result moved from the source's appearance to the true one: 0 = the source's own, 1 = the truth's.

    Negative if the result is further from the truth than the source was.

    Args:
        result, truth, source: pictures (3, H, W) in [0, 1] of the same shape in the same pose.
        mask: where the object is in all three, (H, W) in [0, 1].
    """
    start = appearance_distance(source, truth, mask, mask)
    if start == 0:
        raise ValueError("source and truth look the same inside the mask: there is no appearance to score")
    return 1 - appearance_distance(result, truth, mask, mask) / start


def _patches(image: Tensor, mask: Tensor, side: int, shrink: int) -> Tensor:
    """(N, 3 * side * side): every patch centred inside the mask; all patches touching it if none is."""
    image, weight = image.float().cpu()[None], mask.float().cpu()[None, None]
    if not bool((weight > 0).any()):
        raise ValueError("the mask is empty: there are no patches to compare")
    # Outside the object everything is one flat grey, so that the background never counts as appearance.
    image = torch.where(weight > 0.5, image, 0.5)
    if shrink > 1:
        image, weight = F.avg_pool2d(image, shrink), F.avg_pool2d(weight, shrink)
    inside = weight[0, 0] > 0.5
    if not bool(inside.any()):
        inside = weight[0, 0] > 0
    columns = F.unfold(F.pad(image, [side // 2] * 4, value=0.5), side)[0].T
    return columns[inside.flatten()]
