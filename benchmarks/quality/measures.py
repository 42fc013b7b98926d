"""What a result is measured by, and how sure the mean over all pairs is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from skimage.color import deltaE_ciede2000, rgb2lab
from torch import Tensor

from demo import world
from demo.judge import Judge
from demo.vit import BACKBONE
from demo.weights import FOLDER
from inversion_core.features import Backbone, TimmExtractor, load
from inversion_core.metrics import appearance_score, cls_similarity, mask_iou, self_similarity_distance

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
    "vit_layout": "self-similarity distance to A's picture, keys of demo-vit's last block (lower is better)",
    "vit_look": "cosine similarity of demo-vit's CLS token with that of B's picture",
    "judge_layout": "self-similarity distance to A's picture, by the judge's features, which no method uses",
    "judge_look": "cosine similarity of the judge's summaries with that of B's picture",
}
_EDGE = 2


@dataclass(frozen=True)
class Judges:
    """Who looks at results: the judge of the demo world, trained on its names and masks, and demo-vit, without any."""

    judge: Judge
    vit: TimmExtractor

    @classmethod
    def load(cls) -> Judges:
        """Both with the committed weights."""
        backbone = Backbone(**BACKBONE)
        return cls(Judge.load(), TimmExtractor(load(backbone, FOLDER / backbone.file), backbone))


def measure(picture: Tensor, pair: Pair, judges: Judges, *, placed: bool = False) -> dict[str, float]:
    """All measures of one result (H, W, 3) in [0, 1]; `placed`: it should lie on C's background instead of A's."""
    verdict = judges.judge.look(picture[None])
    truth, source = (pair.placed_truth, pair.placed_source) if placed else (pair.truth, pair.shape)
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
        **_similarities(picture, pair, judges),
    }


def _similarities(picture: Tensor, pair: Pair, judges: Judges) -> dict[str, float]:
    """To the two pictures that were given, as published tables have it: layout to A's, look to B's."""
    pictures = (picture, *(torch.from_numpy(one.image) for one in (pair.shape, pair.appearance)))
    made, a, b = (one.permute(2, 0, 1)[None] for one in pictures)
    seen = [judges.vit(one) for one in (made, a, b)]
    (made_layout, made_look), (a_layout, _), (_, b_look) = (_summary(judges.judge, one) for one in (made, a, b))
    return {
        "vit_layout": self_similarity_distance(seen[0], seen[1]),
        "vit_look": cls_similarity(seen[0], seen[2]),
        "judge_layout": float(F.mse_loss(made_layout, a_layout)),
        "judge_look": float(F.cosine_similarity(made_look, b_look, dim=0)),
    }


@torch.no_grad()
def _summary(judge: Judge, picture: Tensor) -> tuple[Tensor, Tensor]:
    """What the judge's network makes of a picture (1, 3, H, W): self-similarity of its 16x16 grid, and one vector.

    The vector is the mean and the largest of each channel of its last level. Both are of features that were trained to
    name and to find objects, not by pairs of views as demo-vit's were.
    """
    levels, h = [], picture * 2 - 1
    for block in judge.network.down:
        h = block(h)
        levels.append(h)
    grid = F.normalize(levels[2].flatten(2)[0], dim=0)
    return grid.T @ grid, torch.cat([levels[-1].mean((2, 3)), levels[-1].amax((2, 3))], dim=1)[0]


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
