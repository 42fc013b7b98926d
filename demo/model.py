"""The demo model as ComfyUI knows models: a genuine MODEL (ModelPatcher), CLIP and VAE."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor, nn

from .autoencoder import DemoAutoencoder
from .denoiser import build_denoiser
from .dit import build_dit
from .text import clip_target
from .weights import AUTOENCODER, CURE, DENOISER, DIT, FOLDER, TEXT_ENCODER, DemoWeightsError, load_weights

Network = Literal["UNet", "DiT"]
"""The UNet predicts v on SD's noise schedule, the diffusion transformer a rectified flow's velocity."""
_NETWORKS: dict[Network, tuple[str, Callable[..., comfy.model_base.BaseModel]]] = {
    "UNet": (DENOISER, build_denoiser),
    "DiT": (DIT, build_dit),
}


class DemoModel(NamedTuple):
    """What a checkpoint loader returns."""

    model: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE


def load_demo_model(folder: Path = FOLDER, embedding_directory: Any = None, network: Network = "UNet") -> DemoModel:
    """Read the demo's weights and build the model.

    Args:
        folder: where the safetensors files lie.
        embedding_directory: where ``embedding:name`` looks, as ComfyUI's CLIP takes it.
        network: which of the two diffusion models; both share the text encoder and the autoencoder.

    Raises:
        DemoWeightsError: a file is missing, corrupt, or does not fit the architecture.
    """
    vae = load_vae(folder)
    model = _model(network, folder, vae.first_stage_model)
    return DemoModel(model, load_clip(folder, embedding_directory), vae)


def _model(network: Network, folder: Path, first_stage: DemoAutoencoder) -> comfy.model_patcher.ModelPatcher:
    name, build = _NETWORKS[network]
    state = load_weights(name, folder)
    parameters = sum(value.numel() for value in state.values())
    load_device = comfy.model_management.get_torch_device()
    dtype = comfy.model_management.unet_dtype(model_params=parameters, supported_dtypes=[torch.bfloat16, torch.float32])
    offload_device = comfy.model_management.unet_offload_device()
    model = build(dtype, offload_device)
    _load(model.diffusion_model, state, name)
    model.latent_format.latent_rgb_factors = first_stage.preview.float().tolist()
    model.latent_format.latent_rgb_factors_bias = first_stage.preview_bias.float().tolist()
    return comfy.model_patcher.ModelPatcher(model, load_device=load_device, offload_device=offload_device)


def load_clip(folder: Path = FOLDER, embedding_directory: Any = None) -> comfy.sd.CLIP:
    """The demo's text encoder alone; raises as `load_demo_model` does."""
    state = load_weights(TEXT_ENCODER, folder)
    parameters = sum(value.numel() for value in state.values())
    clip = comfy.sd.CLIP(target=clip_target(), embedding_directory=embedding_directory, parameters=parameters)
    _load(clip.cond_stage_model, state, TEXT_ENCODER)
    return clip


def load_vae(folder: Path = FOLDER) -> comfy.sd.VAE:
    """The demo's autoencoder alone; raises as `load_demo_model` does."""
    state = load_weights(AUTOENCODER, folder)
    # ComfyUI's VAE knows how to build its own first stages only: give it a tiny one of those, then put ours in place.
    size = {"double_z": True, "z_channels": 4, "resolution": 128, "in_channels": 3, "out_ch": 3, "ch": 32}
    size |= {"ch_mult": [1], "num_res_blocks": 0, "attn_resolutions": [], "dropout": 0.0}
    config = {"params": {"ddconfig": size, "embed_dim": 4}}
    stand_in = comfy.sd.AutoencoderKL(**config["params"])
    vae = comfy.sd.VAE(sd=stand_in.state_dict(), config=config)
    first_stage = DemoAutoencoder().eval()
    _load(first_stage, state, AUTOENCODER)
    vae.first_stage_model = first_stage.to(vae.vae_dtype)
    vae.patcher = comfy.model_patcher.ModelPatcher(
        first_stage, load_device=vae.patcher.load_device, offload_device=vae.patcher.offload_device
    )
    vae.size = comfy.model_management.module_size(first_stage)
    # At a quarter of the resolution, activations are an order smaller than those of SD's autoencoder.
    vae.memory_used_encode = lambda shape, dtype: 200 * shape[2] * shape[3] * comfy.model_management.dtype_size(dtype)
    vae.memory_used_decode = lambda shape, dtype: (
        200 * shape[2] * shape[3] * 64 * comfy.model_management.dtype_size(dtype)
    )
    return vae


def _load(module: nn.Module, state: dict[str, Tensor], name: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise DemoWeightsError(
            f"demo weights {name} belong to another version of the pack ({error}): {CURE}"
        ) from error
