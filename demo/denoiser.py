"""The demo's denoiser: ComfyUI's own UNetModel in SD's shape, small, predicting v on SD's noise schedule."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.supported_models_base
import torch

from .text import WIDTH


class DemoLatent(comfy.latent_formats.LatentFormat):
    """4 channels of unit variance. The preview factors are set from the autoencoder's weights when it is loaded."""

    scale_factor = 1.0

    def __init__(self) -> None:
        self.latent_rgb_factors: list[list[float]] | None = None
        self.latent_rgb_factors_bias: list[float] | None = None


class DemoConfig(comfy.supported_models_base.BASE):
    """What ComfyUI's model base needs to know of the demo model."""

    family_name = "the demo model"
    latent_format = DemoLatent
    memory_usage_factor = 0.2
    unet_extra_config: dict[str, Any] = {}  # noqa: RUF012 (ComfyUI's own layout)
    supported_inference_dtypes = [torch.bfloat16, torch.float32]  # noqa: RUF012

    def model_type(self, state_dict: dict, prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.V_PREDICTION


UNET: dict[str, Any] = {
    "image_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "context_dim": WIDTH,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "legacy": False,
}
"""Two levels: 64 channels at 16x16 and 128 at 8x8 for a 128x128 picture."""


def build_denoiser(dtype: torch.dtype = torch.float32, device: Any = None) -> comfy.model_base.BaseModel:
    """A BaseModel with uninitialised weights."""
    config = DemoConfig(UNET)
    config.set_inference_dtype(dtype, None)
    return comfy.model_base.BaseModel(config, model_type=config.model_type({}), device=device)
