"""Small ComfyUI models with random weights, and sampling with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sample
import comfy.supported_models
import pytest
import torch
from torch import Tensor

from demo.denoiser import build_denoiser
from demo.train.data import reset

Patcher = Any
"""A comfy.model_patcher.ModelPatcher."""


def patcher_of(base: Any) -> Patcher:
    torch.manual_seed(0)
    reset(base.diffusion_model)
    return comfy.model_patcher.ModelPatcher(base, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def demo_patcher() -> Patcher:
    return patcher_of(build_denoiser())


def sd15_patcher() -> Patcher:
    """SD1.5's UNet block for block, a tenth of its width: 8 heads in every attention."""
    return _supported(
        comfy.supported_models.SD15,
        channel_mult=[1, 2, 2, 2],
        num_res_blocks=[2, 2, 2, 2],
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_output=[1] * 9 + [0] * 3,
        transformer_depth_middle=1,
        use_linear_in_transformer=False,
        adm_in_channels=None,
    )


POOLED = 16


def sdxl_patcher() -> Patcher:
    """SDXL's UNet with two transformer blocks where it has ten: linear projections, size and pooled conditioning."""
    return _supported(
        comfy.supported_models.SDXL,
        channel_mult=[1, 2, 2],
        num_res_blocks=[2, 2, 2],
        transformer_depth=[0, 0, 1, 1, 2, 2],
        transformer_depth_output=[0, 0, 0, 1, 1, 1, 2, 2, 2],
        transformer_depth_middle=2,
        use_linear_in_transformer=True,
        num_classes="sequential",
        adm_in_channels=POOLED + 6 * 256,
        num_heads=-1,
        num_head_channels=16,
    )


def sd21_patcher() -> Patcher:
    """SD2.1's UNet block for block, narrow: linear projections, heads of one width, predicts v as its 768 form does."""
    # ComfyUI tells the two forms by this weight.
    bias = torch.tensor([-1.0, 1.0])
    return _supported(
        comfy.supported_models.SD20,
        {"output_blocks.11.1.transformer_blocks.0.norm1.bias": bias},
        channel_mult=[1, 2, 2, 2],
        num_res_blocks=[2, 2, 2, 2],
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_output=[1] * 9 + [0] * 3,
        transformer_depth_middle=1,
        use_linear_in_transformer=True,
        adm_in_channels=None,
        num_heads=-1,
        num_head_channels=16,
    )


def _supported(family: Any, weights: dict[str, Tensor] | None = None, **unet: Any) -> Patcher:
    shape = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "context_dim": 128}
    shape |= {"use_spatial_transformer": True, "use_temporal_attention": False, "legacy": False}
    config = family({**shape, **unet})
    config.unet_config.update(unet)  # the family has put its own width of a head into it
    config.set_inference_dtype(torch.float32, None)
    return patcher_of(config.get_model(weights or {}))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompt(seed: int, **extra: Any) -> list:
    """A CONDITIONING of one random prompt."""
    return [[random(1, 32, 128, seed=seed), extra]]


POSITIVE, NEGATIVE = prompt(101), prompt(102)
NOISE = random(3, 4, 16, 16, seed=100)


def sample(
    model: Patcher,
    *,
    noise: Tensor = NOISE[:1],
    steps: int = 3,
    cfg: float = 3.0,
    positive: list = POSITIVE,
    negative: list = NEGATIVE,
    denoise: float = 1.0,
) -> Tensor:
    """What the stock KSampler gives for this noise."""
    latent = torch.zeros_like(noise)
    return comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        "euler",
        "normal",
        positive,
        negative,
        latent,
        denoise=denoise,
        disable_pbar=True,
        seed=0,
    )


def with_low_memory(model: Patcher) -> Patcher:
    """A clone that, while sampling, finds no memory to put two prompts into one call."""
    free_memory = comfy.model_management.get_free_memory

    def nothing_free(device: Any = None, torch_free_too: bool = False) -> Any:
        return free_memory(device, True) if torch_free_too else 0

    def sample_poorly(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(comfy.model_management, "get_free_memory", nothing_free)
            return executor(*args, **kwargs)

    clone = model.clone()
    kind = comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE
    clone.add_wrapper_with_key(kind, "test_low_memory", sample_poorly)
    return clone


def with_record_of_rows(model: Patcher) -> tuple[Patcher, list[list[int]]]:
    """A clone and what it will be asked: `cond_or_uncond` of each call, 0 for positive."""
    calls: list[list[int]] = []

    def record(apply: Any, arguments: dict) -> Tensor:
        calls.append(list(arguments["cond_or_uncond"]))
        return apply(arguments["input"], arguments["timestep"], **arguments["c"])

    clone = model.clone()
    clone.set_model_unet_function_wrapper(record)
    return clone, calls


def with_record_of_site(model: Patcher, block: str, number: int) -> tuple[Patcher, list[Tensor]]:
    """A clone and what the first self-attention of this block will give (B, N, C), call by call."""
    outputs: list[Tensor] = []

    def record(n: Tensor, extra: dict) -> Tensor:
        if extra["block"][:2] == (block, number) and extra["block_index"] == 0:
            outputs.append(n.clone())
        return n

    clone = model.clone()
    clone.set_model_attn1_output_patch(record)
    return clone, outputs


@contextmanager
def passes(model: Patcher) -> Iterator[list[dict]]:
    """Every evaluation of the UNet, the references' included: rows, grid, context and y."""
    seen: list[dict] = []

    def record(_: Any, args: tuple, kwargs: dict) -> None:
        x = args[0]
        seen.append(
            {"rows": x.shape[0], "grid": tuple(x.shape[-2:]), "context": kwargs["context"], "y": kwargs.get("y")}
        )

    handle = model.model.diffusion_model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
