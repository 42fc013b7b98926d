"""UNets of real sizes and a stack of Flux's blocks, with random weights, and single evaluations by ComfyUI itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch
from torch import Tensor

from demo.train.data import reset
from inversion_core.hosts.comfy_injection import of_transformer
from inversion_core.reference import Reference

Patcher = Any
"""A comfy.model_patcher.ModelPatcher."""

PERCENT = 0.4
"""Where in the schedule single evaluations happen: inside every window of every preset."""

_ANY = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "legacy": False,
}
_SD15 = {
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "use_linear_in_transformer": False,
    "num_heads": 8,
    "adm_in_channels": None,
}
_SDXL = {
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "use_linear_in_transformer": True,
    "num_heads": -1,
    "num_classes": "sequential",
}
_FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "mlp_ratio": 4.0,
    "depth": 1,
    "depth_single_blocks": 2,
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
}
"""One of its 19 double blocks and two of its 38 single ones: about their proportion."""
_TIME_IDS = 6 * 256
"""Channels of SDXL's size conditioning."""


@dataclass(frozen=True, eq=False)
class UNet:
    """A model to measure.

    Attributes:
        patcher: ComfyUI's.
        latent: side of the square latents it is measured at.
        positive, negative: random prompts.
        appearance, shape: random references of the latents' size.
    """

    patcher: Patcher
    latent: int
    positive: list
    negative: list
    appearance: Reference
    shape: Reference

    @property
    def noise(self) -> Tensor:
        return _random(1, self.appearance.latent.shape[1], self.latent, self.latent, seed=0)

    @property
    def is_transformer(self) -> bool:
        """Whether it is a stack of a transformer's blocks, no UNet."""
        return of_transformer(self.patcher)

    @property
    def text(self) -> int:
        """Tokens of a prompt."""
        return self.positive[0][0].shape[1]


def build(name: str, latent: int, dtype: torch.dtype, *, tiny: bool = False) -> UNet:
    """`sd15`, `sdxl` or `flux` as ComfyUI builds it; `tiny`: block for block the same, a tenth of its width."""
    pooled = 16 if tiny else 768 if name == "flux" else 1280
    config, width = _flux(pooled, tiny) if name == "flux" else _unet(name, pooled, tiny)
    config.set_inference_dtype(dtype, None)
    torch.manual_seed(0)
    base = config.get_model({})
    reset(base.diffusion_model)
    for key, weight in base.diffusion_model.named_parameters():
        if key.endswith("norm.scale"):  # Flux's own norms have nothing that `reset` could call
            torch.nn.init.ones_(weight)
    device = comfy.model_management.get_torch_device()
    patcher = comfy.model_patcher.ModelPatcher(base, load_device=device, offload_device=torch.device("cpu"))
    positive, negative = (
        [[_random(1, 77, width, seed=i), {"pooled_output": _random(1, pooled, seed=i)}]] for i in (1, 2)
    )
    channels = base.latent_format.latent_channels
    references = (Reference(_random(1, channels, latent, latent, seed=i)) for i in (3, 4))
    return UNet(patcher, latent, positive, negative, *references)


def _unet(name: str, pooled: int, tiny: bool) -> tuple[Any, int]:
    """The configuration, and the width of its prompt."""
    family, shape, width = {
        "sd15": (comfy.supported_models.SD15, _SD15, 768),
        "sdxl": (comfy.supported_models.SDXL, _SDXL, 2048),
    }[name]
    sizes: dict[str, Any] = {"model_channels": 32 if tiny else 320, "context_dim": 64 if tiny else width}
    if name == "sdxl":
        sizes |= {"adm_in_channels": pooled + _TIME_IDS, "num_head_channels": 16 if tiny else 64}
    return family({**_ANY, **shape, **sizes}), sizes["context_dim"]


def _flux(pooled: int, tiny: bool) -> tuple[Any, int]:
    """The configuration, and the width of its prompt."""
    width = 64 if tiny else 4096
    sizes = {
        "vec_in_dim": pooled,
        "context_in_dim": width,
        "hidden_size": 64 if tiny else 3072,
        "num_heads": 4 if tiny else 24,
        "axes_dim": [4, 6, 6] if tiny else [16, 56, 56],
    }
    return comfy.supported_models.Flux({"image_model": "flux", **_FLUX, **sizes}), width


def sample(unet: UNet, model: Patcher, steps: int, cfg: float) -> Tensor:
    """The latents of one picture by the stock KSampler."""
    noise = unet.noise
    latent = torch.zeros_like(noise)
    return comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        "euler",
        "normal",
        unet.positive,
        unet.negative,
        latent,
        disable_pbar=True,
        seed=0,
    )


Evaluate = Callable[[], None]


def within_a_run(unet: UNet, model: Patcher, work: Callable[[Evaluate, Evaluate], None]) -> None:
    """Sample with a patched model, but let `work` decide what is evaluated: the plain model, and the patched one.

    Each evaluation is that of a guided step, the positive and the negative prompt at `PERCENT` of the schedule, and
    goes through ComfyUI's own calc_cond_batch. It has ended on the device when the call returns.
    """

    def instead_of_a_sampler(denoise: Any, x: Tensor, sigmas: Tensor, extra_args: dict, **_: Any) -> Tensor:
        def evaluate(options: dict) -> None:
            denoise(x, sigmas[0].expand(x.shape[0]), denoise_mask=None, model_options=options, seed=0)
            synchronise()

        work(partial(evaluate, {"transformer_options": {}}), partial(evaluate, extra_args["model_options"]))
        return x

    sampler = comfy.samplers.KSAMPLER(instead_of_a_sampler)
    sigma = unet.patcher.get_model_object("model_sampling").percent_to_sigma(PERCENT)
    latent = torch.zeros_like(unet.noise)
    sigmas = torch.tensor([sigma, 0.0])
    comfy.sample.sample_custom(
        model, unet.noise, 5.0, sampler, sigmas, unet.positive, unet.negative, latent, disable_pbar=True, seed=0
    )


def synchronise() -> None:
    """Wait until the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
