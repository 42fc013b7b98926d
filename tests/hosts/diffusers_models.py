"""diffusers pipelines with the weights of the small ComfyUI models, and the same sampling with both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from torch import Tensor

from .models import NEGATIVE, NOISE, POOLED, POSITIVE, Patcher, prompt, random, sd15_patcher, sd21_patcher, sdxl_patcher

Pipe = Any
"""A diffusers pipeline."""

_SD1: dict[str, Any] = {
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "attention_head_dim": 8,  # a number of heads, whatever diffusers calls it
}
_SD2: dict[str, Any] = {**_SD1, "attention_head_dim": (2, 4, 4, 4), "use_linear_projection": True}
_SDXL: dict[str, Any] = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": POOLED + 6 * 256,
}
FAMILIES: dict[str, tuple[Any, dict[str, Any], str, float]] = {
    "sd15": (sd15_patcher, _SD1, "epsilon", 0.18215),
    "sd21": (sd21_patcher, _SD2, "v_prediction", 0.18215),
    "sdxl": (sdxl_patcher, _SDXL, "epsilon", 0.13025),
}
"""By name: the ComfyUI model, its shape in diffusers' words, what it predicts, the factor of its latents."""


class Twins(NamedTuple):
    """One model in both worlds, with its two prompts."""

    comfy: Patcher
    pipe: Pipe
    positive: list
    negative: list


def twins(name: str) -> Twins:
    """A model of FAMILIES; ComfyUI's own table says which weight goes where."""
    build, shape, predicts, factor = FAMILIES[name]
    patcher = build()
    weights = patcher.model.diffusion_model.state_dict()
    table = comfy.utils.unet_to_diffusers(patcher.model.model_config.unet_config)
    unet = UNet2DConditionModel(cross_attention_dim=128, sample_size=16, **shape)
    unet.load_state_dict({name: weights[table[name]] for name in unet.state_dict()})
    extra = ({"pooled_output": random(1, POOLED, seed=i)} if name == "sdxl" else {} for i in (5, 6))
    return Twins(
        patcher, pipeline(unet.eval(), predicts, factor), prompt(101, **next(extra)), prompt(102, **next(extra))
    )


def pipeline(unet: UNet2DConditionModel, predicts: str = "epsilon", factor: float = 0.18215, **parts: Any) -> Pipe:
    """A pipeline around a UNet, by default without text encoders."""
    levels: dict[str, Any] = {
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    vae = AutoencoderKL(**levels, norm_num_groups=4, latent_channels=4, scaling_factor=factor)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=predicts, steps_offset=1
    )
    made: dict[str, Any] = {"vae": vae.eval(), "unet": unet, "scheduler": scheduler, "text_encoder": None}
    made |= {"tokenizer": None, **parts}
    if unet.config["addition_embed_type"] is None:
        made |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe: Pipe = StableDiffusionPipeline(**made)
    else:
        made = {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False, **made}
        pipe = StableDiffusionXLPipeline(**made)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_comfy(
    model: Patcher, both: Twins, timesteps: Sequence[int], noise: Tensor = NOISE[:1], cfg: float = 3.0
) -> Tensor:
    """Euler steps at these timesteps and to the end, by ComfyUI; in units of the model's latents."""
    table = both.comfy.get_model_object("model_sampling").sigmas
    sigmas = torch.cat((table[list(timesteps)], table.new_zeros(1)))
    latent = comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        both.positive,
        both.negative,
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=0,
    )
    return both.comfy.model.process_latent_in(latent)


def by_diffusers(both: Twins, timesteps: Sequence[int], noise: Tensor = NOISE[:1], cfg: float = 3.0) -> Tensor:
    """The same by diffusers."""
    return euler(both.pipe, timesteps, both.positive, both.negative, noise, cfg)


def euler(
    pipe: Pipe,
    timesteps: Sequence[int],
    positive: list = POSITIVE,
    negative: list = NEGATIVE,
    noise: Tensor = NOISE[:1],
    cfg: float = 3.0,
) -> Tensor:
    """A pipeline's latents after Euler steps at these timesteps and to the end; prompts as ComfyUI has them."""
    # ComfyUI starts the whole schedule, and only that, as this spacing does.
    spacing = "leading" if timesteps[0] == 999 else "linspace"
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    told: dict[str, Tensor] = {}
    for kind, conditioning in [("", positive), ("negative_", negative)] if cfg > 1 else [("", positive)]:
        told[f"{kind}prompt_embeds"], extra = conditioning[0]
        if extra:
            told[f"{kind}pooled_prompt_embeds"] = extra["pooled_output"]
    height, width = (8 * side for side in noise.shape[-2:])
    return pipe(
        **told,
        num_images_per_prompt=noise.shape[0],
        timesteps=list(timesteps),
        guidance_scale=cfg,
        latents=noise.clone(),
        height=height,
        width=width,
        output_type="latent",
    ).images
