"""What a result is measured by, and how sure the mean over all pairs is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from skimage.color import deltaE_ciede2000, rgb2lab
from torch import Tensor

from demo import world
from demo.judge import Judge
from inversion_core.metrics import appearance_score, mask_iou

from .pairs import Pair

MEASURES = {
    "shape_iou": "overlap of the object the judge finds with the true one",
    "boundary_f": "F-score of its outline, within 2 pixels",
    "appearance": "sliced Wasserstein of patches inside the true mask: 1 = the true composition, 0 = A's appearance",
    "texture": "share of pictures in which the judge finds B's texture",
    "colour": "share of pictures in which the judge finds B's colour",
    "colour_delta_e": "CIEDE2000 between the mean colours inside the mask (lower is better)",
    "background": "1 - mean absolute difference to A's background outside the mask, in shares of its full range",
    "harmonic": "harmonic mean of shape_iou and appearance, of each picture (0 where one is not above 0)",
}
_EDGE = 2


def measure(picture: Tensor, pair: Pair, judge: Judge) -> dict[str, float]:
    """All measures of one result (H, W, 3) in [0, 1]."""
    verdict = judge.look(picture[None])
    truth, source = pair.truth, pair.shape
    mask = torch.from_numpy(truth.mask)
    made, true, own = (torch.as_tensor(image).permute(2, 0, 1) for image in (picture, truth.image, source.image))
    found = verdict.mask[0]
    iou, appearance = mask_iou(found, mask), appearance_score(made, true, own, mask)
    inside = mask > 0.5
    means = [rgb2lab(image[:, inside].mean(1).numpy()) for image in (made, true)]
    outside = F.max_pool2d(mask[None], 9, 1, 4)[0] < 0.01
    return {
        "shape_iou": iou,
        "boundary_f": _boundary_f(found > 0.5, inside),
        "appearance": appearance,
        "texture": float(verdict.texture[0] == world.value(pair.b, "texture")),
        "colour": float(verdict.colour[0] == world.value(pair.b, "colour")),
        "colour_delta_e": float(deltaE_ciede2000(*means)),
        "background": 1 - float((made - true)[:, outside].abs().mean()),
        "harmonic": 2 * iou * appearance / (iou + appearance) if min(iou, appearance) > 0 else 0.0,
    }


def _boundary_f(a: Tensor, b: Tensor) -> float:
    edges = [_outline(x) for x in (a, b)]
    if not all(bool(edge.any()) for edge in edges):
        return 0.0
    near = [F.max_pool2d(edge[None].float(), 2 * _EDGE + 1, 1, _EDGE)[0] > 0 for edge in edges]
    precision = float((edges[0] & near[1]).sum() / edges[0].sum())
    recall = float((edges[1] & near[0]).sum() / edges[1].sum())
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _outline(mask: Tensor) -> Tensor:
    """The pixels of a mask (H, W) with a neighbour outside."""
    return mask & (F.max_pool2d((~mask)[None].float(), 3, 1, 1)[0] > 0)


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """Mean with its 95 % bootstrap interval: (mean, low, high)."""
    sample = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(0)
    means = sample[rng.integers(0, len(sample), (draws, len(sample)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(sample.mean()), float(low), float(high)
