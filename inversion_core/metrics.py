"""What composition is measured by: where the shape is, and how close the appearance came."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .color import to_space
from .features import FeatureError, FeatureExtractor, Features, self_similarity

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


def self_similarity_distance(a: Features, b: Features) -> float:
    """Mean squared difference of the keys' self-similarities, CLS included where there is one: 0 = the same layout.

    Splice's structure loss (arXiv 2201.00424) if the features are those of the last block of DINO ViT-B/8 at 224 x 224;
    tables call it "DINO self-sim", such as Ctrl-X's (arXiv 2406.07540).

    Args:
        a, b: of one picture each, on the same grid.

    Raises:
        ValueError: the grids differ, or there are several pictures.
    """
    if a.tokens.shape[0] != 1 or b.tokens.shape[0] != 1:
        raise ValueError(f"{a.tokens.shape[0]} and {b.tokens.shape[0]} pictures: compare them one by one")
    return float(self_similarity_loss(a, b))


def self_similarity_loss(pictures: Features, target: Features) -> Tensor:
    """`self_similarity_distance` of each of several pictures to one: (B,), float32, differentiable.

    Raises:
        ValueError: the grids differ.
    """
    if pictures.grid != target.grid:
        raise ValueError(f"the features lie on {pictures.grid} and {target.grid}: resize one picture to the other's")
    with_cls = pictures.cls_key is not None
    found, wanted = (self_similarity(one, with_cls=with_cls) for one in (pictures, target))
    return (found - wanted).square().mean((1, 2))


def cls_similarity(a: Features, b: Features) -> float:
    """Cosine similarity of the CLS tokens after the last LayerNorm: 1 = the same appearance (tables: "DINO-I").

    Raises:
        FeatureError: the backbone has no CLS token.
    """
    if a.cls_normed is None or b.cls_normed is None:
        raise FeatureError("this backbone has no CLS token to compare: choose one that has, such as DINO's")
    return float(F.cosine_similarity(a.cls_normed.float(), b.cls_normed.float(), dim=1).mean())


def color_difference(a: Tensor, b: Tensor, mask_a: Tensor | None = None, mask_b: Tensor | None = None) -> float:
    """Distance of the mean colours inside the masks in CIELAB (CIE 1976 Delta E: about 2.3 is just seen).

    Args:
        a, b: pictures (3, H, W) in [0, 1], sRGB; their sizes may differ.
        mask_a, mask_b: (H, W) in [0, 1] for each; None: the whole picture.

    Raises:
        ValueError: a mask is empty.
    """
    means = []
    for picture, mask in ((a, mask_a), (b, mask_b)):
        weight = torch.ones(picture.shape[1:]) if mask is None else mask.float().cpu()
        if not bool((weight > 0).any()):
            raise ValueError("the mask is empty: there are no colours to compare")
        lab = to_space(picture.float().cpu()[None], "lab")[0]
        means.append((lab * weight).sum((1, 2)) / weight.sum())
    return float((means[0] - means[1]).norm())


@dataclass(frozen=True)
class CompositionScore:
    """How well a result joins the shape of one picture and the appearance of another.

    Attributes:
        backbone, block, size: what saw the pictures; block counted from 0, size as in `FeatureExtractor`.
        self_similarity_distance: of result and shape picture; smaller is better.
        cls_similarity: of result and appearance picture, at most 1; None if the backbone has no CLS token.
        mask_iou: of the result's and the shape picture's masks, 0 to 1; None unless both were given.
        color_difference: of result and appearance picture, inside their masks; smaller is better.
    """

    backbone: str
    block: int
    size: int
    self_similarity_distance: float
    cls_similarity: float | None
    mask_iou: float | None
    color_difference: float


def composition_score(
    extractor: FeatureExtractor,
    result: Tensor,
    shape: Tensor,
    appearance: Tensor,
    *,
    result_mask: Tensor | None = None,
    shape_mask: Tensor | None = None,
    appearance_mask: Tensor | None = None,
    block: int = -1,
    size: int | None = None,
) -> CompositionScore:
    """Score a result against the two pictures it was made from.

    Args:
        extractor: Splice's is `dino-vitb8`, its last block, at its own size.
        result, shape, appearance: pictures (3, H, W) in [0, 1]. The shape picture is resized to the result's size.
        result_mask, shape_mask, appearance_mask: (H, W) in [0, 1], where the object is in each. Without its own mask,
            the result's colours are measured where the shape picture has its object.
        block, size: see `FeatureExtractor`.

    Raises:
        ValueError: a mask is empty.
    """
    fitted = _resized(shape, result)
    seen = {
        name: extractor(picture[None], block=block, size=size)
        for name, picture in (("result", result), ("shape", fitted), ("appearance", appearance))
    }
    goal = None if shape_mask is None else _resized(shape_mask[None], result)[0]
    own = None if result_mask is None else _resized(result_mask[None], result)[0]
    return CompositionScore(
        extractor.name,
        block % extractor.depth,
        extractor.size if size is None else size,
        self_similarity_distance(seen["result"], seen["shape"]),
        cls_similarity(seen["result"], seen["appearance"]) if extractor.has_cls else None,
        None if own is None or goal is None else mask_iou(own, goal),
        color_difference(result, appearance, goal if own is None else own, appearance_mask),
    )


def _resized(picture: Tensor, like: Tensor) -> Tensor:
    """(C, H, W) at the size of another picture, in [0, 1]."""
    if picture.shape[1:] == like.shape[1:]:
        return picture
    return F.interpolate(picture[None], size=like.shape[1:], mode="bicubic", antialias=True)[0].clamp(0, 1)


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
