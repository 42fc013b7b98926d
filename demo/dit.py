"""The demo's diffusion transformer: ComfyUI's own SD3 model class, small, predicting a rectified flow's velocity."""

from __future__ import annotations

from typing import Any

import comfy.model_base
import torch

from .denoiser import DemoConfig
from .text import WIDTH


class DemoFlowConfig(DemoConfig):
    """What ComfyUI's model base needs to know of the demo's transformer."""

    # More of the steps where almost all is noise and the shape is decided; ComfyUI gives SD3 itself 3.
    sampling_settings = {"shift": 2.0}  # noqa: RUF012 (ComfyUI's own layout)

    def model_type(self, state_dict: dict, prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.FLOW


DIT: dict[str, Any] = {
    "input_size": None,
    "patch_size": 2,
    "in_channels": 4,
    "depth": 2,
    "num_blocks": 5,
    "mlp_ratio": 2.0,
    "scale_mod_only": True,
    "qk_norm": "rms",
    "adm_in_channels": WIDTH,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 128}},
    "pos_embed_scaling_factor": None,
}
"""Joint blocks of 128 channels (the class makes them 64 x `depth`) over 64 picture tokens and 32 text tokens.

The class cannot have patches of one: it rounds odd sizes up with a formula that is right for patches of two.
"""


def build_dit(dtype: torch.dtype = torch.float32, device: Any = None) -> comfy.model_base.SD3:
    """An SD3 model with uninitialised weights."""
    config = DemoFlowConfig(DIT)
    config.set_inference_dtype(dtype, None)
    return comfy.model_base.SD3(config, device=device)
