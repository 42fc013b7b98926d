"""A MASK as the core wants it for a batch of pictures, and a picture without the texture inside a mask."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def picture_mask(mask: Tensor, pictures: Tensor, name: str, *, stretched: bool = False) -> Tensor:
    """A MASK for pictures (B, H, W, C) as (1 or B, H, W), resized if it has their shape.

    Args:
        stretched: resized whatever shape it has, as KV Injection stretches a shape reference to the result.

    Raises:
        ValueError: the mask is empty, has another aspect ratio, or fits neither one nor all of the pictures.
    """
    flat = mask.reshape(-1, *mask.shape[-2:]).float()
    count, height, width = pictures.shape[:3]
    if not bool((flat > 0).any()):
        raise ValueError(
            f"{name} ({flat.shape[2]}x{flat.shape[1]}) is empty: paint the object (Open in MaskEditor on Load Image), "
            "or disconnect the mask to use the whole picture"
        )
    if flat.shape[0] not in (1, count):
        raise ValueError(
            f"{name} is a batch of {flat.shape[0]}, but one, or one for each picture ({count}), is needed: "
            "pick one of them"
        )
    if tuple(flat.shape[1:]) == (height, width):
        return flat
    if not stretched and not 0.97 < (flat.shape[2] * height) / (flat.shape[1] * width) < 1.03:
        raise ValueError(
            f"{name} is {flat.shape[2]}x{flat.shape[1]} but the picture is {width}x{height}, another shape: connect "
            "the mask that belongs to this picture"
        )
    return F.interpolate(flat[:, None], size=(height, width), mode="bilinear", antialias=True)[:, 0].clamp(0, 1)


def flattened(pictures: Tensor, mask: Tensor, share: float) -> Tensor:
    """Pictures (B, H, W, C) whose inside moves towards its own mean colour: share 1 leaves the outline alone.

    Args:
        pictures: in [0, 1].
        mask: (1 or B, H, W) in [0, 1], not empty.
        share: 0 to 1.
    """
    weight = mask.to(pictures)[..., None]
    mean = (pictures * weight).sum((1, 2), keepdim=True) / weight.sum((1, 2), keepdim=True)
    return pictures.lerp(mean.expand_as(pictures), weight * share)
