"""What the nodes need of ComfyUI: its folders, and its pictures and masks as the core's tensors."""

from __future__ import annotations

from typing import Any

import folder_paths
import torch
import torch.nn.functional as F
from torch import Tensor

from ..inversion_core.reference import Reference
from .picture_mask import flattened, picture_mask


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


def single_reference(references: tuple[Reference, ...], name: str) -> Reference:
    """The reference in a REFERENCE that must hold one.

    Raises:
        ValueError: it holds several.
    """
    if len(references) != 1:
        raise ValueError(
            f"{name} reference holds {len(references)} pictures, but it must be one: disconnect 'others' there"
        )
    return references[0]


def encode_reference(image: Tensor, vae: Any, mask: Tensor | None, flatten: float, **settings: Any) -> Reference:
    """Encode one picture with the model's own VAE.

    Args:
        image: (1, H, W, 3).
        vae: the model's.
        mask: where the object is.
        flatten: 0 to 1, how much of the texture inside the mask goes, see `flattened`.
        settings: `conditioning`, `noise_seed` and `strength` of the Reference.

    Raises:
        ValueError: several pictures, a video VAE, a mask that does not fit or is empty, nothing to flatten in.
    """
    picture = seen = single_image(image, "the reference image")
    if flatten > 0:
        if mask is None:
            raise ValueError(f"flatten is {flatten}, but there is no mask that says where: connect the object's mask")
        picture = flattened(picture, picture_mask(mask, picture, "the mask"), flatten)
    latent = vae.encode(picture).detach().to("cpu", torch.float32).clone()
    if latent.ndim == 5 and latent.shape[2] == 1:
        latent = latent[:, :, 0]  # Wan's and Qwen-Image's VAE: a picture is a video of one frame
    if latent.ndim != 4:
        raise ValueError(
            f"this VAE gives latents with {latent.ndim - 2} dimensions (video); references need an image VAE"
        )
    grid = (latent.shape[-2], latent.shape[-1])
    on_grid = None if mask is None else reference_mask(mask, picture, grid).cpu()
    # Features look for parts, so they see the picture before anything in it was flattened.
    return Reference(latent, on_grid, picture=seen.detach().float().cpu().movedim(-1, 1), **settings)


def output_mask(mask: Tensor | None) -> Tensor | None:
    """A MASK over the result as (1, 1, H, W), at its own size: hosts resize it to each site."""
    if mask is None:
        return None
    flat = mask.reshape(-1, 1, *mask.shape[-2:]).float().cpu()
    if flat.shape[0] != 1:
        raise ValueError(f"the output mask is a batch of {flat.shape[0]}, but one is needed: pick one of them")
    return flat


def heat_picture(heat: Tensor | None) -> Tensor:
    """A map (h, w) in [0, 1] as an IMAGE, each cell a square of 16 pixels; None as a small black one."""
    cells = torch.zeros(4, 4) if heat is None else heat
    wide = cells.repeat_interleave(16, 0).repeat_interleave(16, 1)
    return wide[None, :, :, None].expand(-1, -1, -1, 3).contiguous()
