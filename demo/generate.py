"""Text to pictures with the demo model through ComfyUI's own samplers, many prompts in one batch."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.sample
import torch
from torch import Tensor

from .model import DemoModel


def encode_prompts(demo: DemoModel, prompts: Sequence[str]) -> list:
    """One CONDITIONING whose rows are the prompts' encodings."""
    encoded = [demo.clip.encode_from_tokens(demo.clip.tokenize(text), return_pooled=True) for text in prompts]
    rows, pooled = zip(*encoded, strict=True)
    return [[torch.cat(rows), {"pooled_output": torch.cat(pooled)}]]


def generate(
    demo: DemoModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 20,
    cfg: float = 4.0,
    sampler: str = "euler",
    scheduler: str = "normal",
) -> Tensor:
    """One 128x128 picture for each prompt: (B, 128, 128, 3) in [0, 1]. A picture depends on its own seed only."""
    latent = torch.zeros(len(prompts), 4, 16, 16)
    noise = torch.cat([comfy.sample.prepare_noise(latent[:1], seed) for seed in seeds])
    samples = comfy.sample.sample(
        demo.model,
        noise,
        steps,
        cfg,
        sampler,
        scheduler,
        encode_prompts(demo, prompts),
        encode_prompts(demo, [""] * len(prompts)),
        latent,
        disable_pbar=True,
        seed=seeds[0],
    )
    return demo.vae.decode(samples)
