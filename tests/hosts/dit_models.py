"""Small ComfyUI diffusion transformers with random weights, one of each family, and what to sample them with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.supported_models
import torch
from comfy.ldm.chroma.model import ChromaParams
from comfy.ldm.flux.model import FluxParams
from torch import Tensor

from .models import Patcher, random

TEXT, WIDTH = 7, 24
"""Tokens of a prompt and their width."""


@dataclass(frozen=True)
class Kind:
    """How a family's small model is built and asked.

    Attributes:
        build: the model.
        latent: shape of a batch of one.
        joint: whether the prompt's tokens stand beside the picture's in the attention.
        sites: its sites in their order.
        pooled: width of the pooled prompt, if it takes one.
    """

    build: Callable[[], Patcher]
    latent: tuple[int, ...]
    joint: bool
    sites: tuple[str, ...]
    pooled: int | None = None

    def prompt(self, seed: int, **extra: Any) -> list:
        if self.pooled is not None:
            extra = {"pooled_output": random(1, self.pooled, seed=seed + 1000), **extra}
        return [[random(1, TEXT, WIDTH, seed=seed), extra]]

    def noise(self, rows: int = 1, size: tuple[int, int] | None = None) -> Tensor:
        shape = self.latent if size is None else (*self.latent[:-2], *size)
        return random(rows, *shape[1:], seed=100)


def _of(family: Any, **unet: Any) -> Patcher:
    config = family({"dtype": torch.float32, **family.unet_config, **unet})
    config.unet_config.update(unet)
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({})
    generator = torch.Generator().manual_seed(0)
    for name, weight in base.diffusion_model.named_parameters():
        values = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            # Not what a training would start with: what a block adds must be seen in the output.
            weight.data = values / weight[0].numel() ** 0.5
        else:
            weight.data = values * 0.1 + (0.0 if name.endswith("bias") else 1.0)
    for values in base.diffusion_model.buffers():
        values.copy_(torch.randn(values.shape, generator=generator))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)


def flux() -> Patcher:
    return _of(
        comfy.supported_models.Flux,
        **_flux_shape(),
        vec_in_dim=16,
        guidance_embed=True,
    )


def _flux_shape() -> dict[str, Any]:
    newer = {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}
    return newer | {
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "context_in_dim": WIDTH,
        "hidden_size": 32,
        "mlp_ratio": 4.0,
        "num_heads": 2,
        "depth": 2,
        "depth_single_blocks": 3,
        "axes_dim": [4, 6, 6],
        "theta": 10000,
        "qkv_bias": True,
    }


def flux2() -> Patcher:
    """The same class as Flux: one cell a token, four axes of places, modulation shared by all blocks."""
    told = _flux_shape() | {
        "in_channels": 128,
        "out_channels": 128,
        "patch_size": 1,
        "axes_dim": [4] * 4,
        "theta": 2000,
    }
    told |= {"vec_in_dim": None, "qkv_bias": False, "ops_bias": False, "mlp_silu_act": True, "global_modulation": True}
    if "txt_ids_dims" in told:
        told["txt_ids_dims"] = [3]
    return _of(comfy.supported_models.Flux2, **told, guidance_embed=True)


def chroma() -> Patcher:
    shape = _flux_shape() | {"in_channels": 64, "out_channels": 64}
    shape |= {"vec_in_dim": None} if "vec_in_dim" in ChromaParams.__dataclass_fields__ else {}  # newer ComfyUI
    return _of(comfy.supported_models.Chroma, **shape, in_dim=64, out_dim=32, hidden_dim=32, n_layers=1)


def sd3() -> Patcher:
    """SD3.5 medium's form: the first blocks have a second attention of the picture alone."""
    return _of(
        comfy.supported_models.SD3,
        in_channels=16,
        patch_size=2,
        depth=2,
        num_blocks=4,
        x_block_self_attn_layers=[0, 1],
        qk_norm="rms",
        adm_in_channels=16,
        context_size=WIDTH,
        context_embedder_config={
            "target": "torch.nn.Linear",
            "params": {"in_features": WIDTH, "out_features": 128},
        },
        pos_embed_max_size=24,
        num_patches=24 * 24,
        input_size=None,
    )


def qwen() -> Patcher:
    return _of(
        comfy.supported_models.QwenImage,
        in_channels=64,
        out_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )


def wan() -> Patcher:
    return _of(
        comfy.supported_models.WAN21_T2V,
        in_dim=16,
        out_dim=16,
        dim=32,
        ffn_dim=48,
        freq_dim=16,
        text_dim=WIDTH,
        num_heads=2,
        num_layers=3,
    )


def _lumina(family: Any, **unet: Any) -> Patcher:
    return _of(
        family,
        in_channels=16,
        patch_size=2,
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        qk_norm=True,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 64, 64],
        ffn_dim_multiplier=2.0,
        multiple_of=8,
        **unet,
    )


def lumina() -> Patcher:
    return _lumina(comfy.supported_models.Lumina2)


def z_image() -> Patcher:
    """Its prompt and its picture are each filled up to a multiple of tokens."""
    return _lumina(comfy.supported_models.Lumina2, pad_tokens_multiple=32)


def _double(count: int) -> tuple[str, ...]:
    return tuple(f"double.{i}.0" for i in range(count))


IMAGE, STILL, VIDEO = (1, 16, 12, 16), (1, 16, 1, 12, 16), (1, 16, 3, 12, 16)
FLUX_SITES = (*_double(2), *(f"single.{i}.0" for i in range(3)))
SD3_SITES = ("double.0.0", "double.0.1", "double.1.0", "double.1.1", "double.2.0", "double.3.0")

KINDS = {
    "flux": Kind(flux, IMAGE, True, FLUX_SITES, pooled=16),
    "chroma": Kind(chroma, IMAGE, True, FLUX_SITES, pooled=16),
    "sd3": Kind(sd3, IMAGE, True, SD3_SITES, pooled=16),
    "qwen": Kind(qwen, STILL, True, _double(3)),
    "wan": Kind(wan, STILL, False, _double(3)),
    "wan-video": Kind(wan, VIDEO, False, _double(3)),
    "lumina2": Kind(lumina, IMAGE, True, _double(3)),
    "z-image": Kind(z_image, IMAGE, True, _double(3)),
}


FLUX2 = Kind(flux2, (1, 128, 6, 8), True, FLUX_SITES, pooled=16)
"""Apart from the others, as its latents have another number of channels."""


@contextmanager
def evaluations(model: Patcher) -> Iterator[list[tuple[int, ...]]]:
    """The shape of every latent that goes through the model, the references' included."""
    seen: list[tuple[int, ...]] = []
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    try:
        yield seen
    finally:
        handle.remove()
