"""What an inversion is learned from: variants of the pictures, encoded once and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .augmentation import Variant, with_new_geometry, with_new_surface
from .inversion import Kind
from .model import LearningError
from .plan import Plan

TEMPLATES: dict[Kind, tuple[str, ...]] = {
    "shape": ("a {words} {token}", "{words} {token}"),
    "appearance": ("a {token} shape", "{token} shape"),
}
"""Prompts of the variants; `words` say what was painted."""
BESIDE = ("a {token} {words}", "{token} {words}")
PREVIEW_SIDE = 256

Encode = Callable[[Tensor], Tensor]
"""Pictures (B, H, W, 3) in [0, 1] -> latents (B, C, h, w) as the model's sampler knows them."""


@dataclass(frozen=True, eq=False)
class Material:
    """Encoded pictures, on the CPU.

    Attributes:
        latents: (M, C, h, w) of the variants.
        masks: (M, 1, h, w) of the variants.
        prompts: of each variant, one or several.
        reference: (B, C, h, w) latents of the pictures themselves.
        reference_masks: (B, 1, h, w).
        preview: uint8 (h, w, 3), the first picture.
        digest: hash of pictures and masks.
    """

    latents: Tensor
    masks: Tensor
    prompts: tuple[tuple[str, ...], ...]
    reference: Tensor
    reference_masks: Tensor
    preview: Tensor
    digest: str


@torch.no_grad()
def prepare(
    encode: Encode,
    pictures: Tensor,
    masks: Tensor,
    plan: Plan,
    progress: Callable[[int, int], None] | None = None,
) -> Material:
    """Make and encode the variants of a plan.

    Args:
        pictures: (B, H, W, 3) in [0, 1]; H and W as the autoencoder wants them.
        masks: (B, H, W) in [0, 1], 1 where the object is.
        progress: told (done, total) after each variant.

    Raises:
        LearningError: pictures and masks do not fit each other, hold no numbers, or a mask is empty.
    """
    require_pictures(pictures, masks)
    latents, grids, prompts = [], [], []
    for number in range(plan.variants):
        variant, templates = _variant(pictures, masks, plan, number)
        latents.append(_encoded(encode, variant.picture))
        grid = F.interpolate(variant.mask[None], size=latents[0].shape[-2:], mode="area")
        grids.append(_inside(grid) if plan.kind == "appearance" else grid)
        words = {"words": variant.words, "token": f"<{plan.name}>"}
        prompts.append(tuple(" ".join(template.format(**words).split()) for template in templates))
        if progress is not None:
            progress(number + 1, plan.variants)
    return Material(
        latents=torch.cat(latents),
        masks=torch.cat(grids),
        prompts=tuple(prompts),
        reference=torch.cat([_encoded(encode, picture.permute(2, 0, 1)) for picture in pictures]),
        reference_masks=F.interpolate(masks[:, None].float(), size=latents[0].shape[-2:], mode="area"),
        preview=_preview(pictures[0]),
        digest=digest_of(pictures, masks),
    )


def digest_of(pictures: Tensor, masks: Tensor) -> str:
    """A hash of pictures and masks."""
    digest = hashlib.sha256(f"{tuple(pictures.shape)}".encode())
    for tensor in (pictures, masks):
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def require_pictures(pictures: Tensor, masks: Tensor) -> None:
    """Raise LearningError if nothing can be learned from these pictures and masks."""
    if pictures.ndim != 4 or pictures.shape[0] < 1 or pictures.shape[-1] != 3:
        raise LearningError(f"pictures must be (B, H, W, 3) with at least one, but they are {tuple(pictures.shape)}")
    if masks.shape != pictures.shape[:3]:
        raise LearningError(
            f"the masks are {tuple(masks.shape)}, but the pictures want {tuple(pictures.shape[:3])}: one for each"
        )
    if not bool(torch.isfinite(pictures).all()):
        raise LearningError("the pictures hold values that are no numbers (NaN or infinity): load them anew")
    empty = [index for index, mask in enumerate(masks) if not bool((mask > 0.5).any())]
    if empty:
        raise LearningError(
            f"the mask of picture {', '.join(map(str, empty))} (counted from 0) is empty: paint what is to be learned"
        )


def _variant(pictures: Tensor, masks: Tensor, plan: Plan, number: int) -> tuple[Variant, tuple[str, ...]]:
    rng = np.random.default_rng([plan.seed, 2, number])
    turn, which = divmod(number, len(pictures))
    picture, mask = pictures[which].permute(2, 0, 1).float().cpu(), masks[which][None].float().cpu()
    if plan.kind == "shape":
        return with_new_surface(picture, mask, rng, centred=plan.framing == "centred"), TEMPLATES["shape"]
    if plan.beside and turn % 2:
        return Variant(picture, mask, plan.beside), BESIDE
    return with_new_geometry(picture, mask, rng), TEMPLATES["appearance"]


def _inside(mask: Tensor) -> Tensor:
    """The cells that lie wholly on the object: what its border looks like is no part of an appearance. Of an object
    that has few such cells, all."""
    whole = (mask > 0.99).to(mask.dtype)
    return whole if float(whole.sum()) >= 0.25 * float(mask.sum()) else mask


def _encoded(encode: Encode, picture: Tensor) -> Tensor:
    return encode(picture.permute(1, 2, 0)[None]).detach().to("cpu", torch.float32).clone()


def _preview(picture: Tensor) -> Tensor:
    """(H, W, 3) in [0, 1] -> bytes, at most `PREVIEW_SIDE` on a side."""
    scale = min(1.0, PREVIEW_SIDE / max(picture.shape[:2]))
    size = [max(1, round(side * scale)) for side in picture.shape[:2]]
    small = F.interpolate(picture.permute(2, 0, 1)[None].float(), size=size, mode="area")[0]
    return (small.permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
