"""What the nodes need of ComfyUI: its folders, and its pictures and masks as the core's tensors."""

from __future__ import annotations

from typing import Any

import folder_paths
import torch
import torch.nn.functional as F
from torch import Tensor

from ..inversion_core.reference import Reference
from .picture_mask import picture_mask


def embedding_folders() -> list[str]:
    """Where ComfyUI looks for textual inversion embeddings."""
    return folder_paths.get_folder_paths("embeddings")


def single_image(image: Tensor, name: str) -> Tensor:
    """An IMAGE that must hold one picture: (1, H, W, 3).

    Raises:
        ValueError: a batch of several.
    """
    if image.shape[0] != 1:
        raise ValueError(f"{name} is a batch of {image.shape[0]} pictures, but a reference is one: pick one of them")
    return image[..., :3]


def reference_mask(mask: Tensor, image: Tensor, grid: tuple[int, int]) -> Tensor:
    """A MASK for one picture on the latent's grid: (1, 1, h, w) in [0, 1]; errors as of `picture_mask`."""
    fitted = picture_mask(mask, image, "the mask")
    return F.interpolate(fitted[:, None], size=grid, mode="area").clamp(0, 1)


def encode_reference(image: Tensor, vae: Any, mask: Tensor | None, conditioning: Any, seed: int) -> Reference:
    """Encode one picture with the model's own VAE."""
    picture = single_image(image, "the reference image")
    latent = vae.encode(picture).detach().to("cpu", torch.float32).clone()
    if latent.ndim != 4:
        raise ValueError(
            f"this VAE gives latents with {latent.ndim - 2} dimensions (video); references need an image VAE"
        )
    grid = (latent.shape[-2], latent.shape[-1])
    on_grid = None if mask is None else reference_mask(mask, picture, grid).cpu()
    return Reference(latent, on_grid, conditioning, seed)


def output_mask(mask: Tensor | None) -> Tensor | None:
    """A MASK over the result as (1, 1, H, W), at its own size: hosts resize it to each site."""
    if mask is None:
        return None
    flat = mask.reshape(-1, 1, *mask.shape[-2:]).float().cpu()
    if flat.shape[0] != 1:
        raise ValueError(f"the output mask is a batch of {flat.shape[0]}, but one is needed: pick one of them")
    return flat
