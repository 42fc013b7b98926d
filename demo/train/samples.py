"""Pictures that a generating stage shows while it learns."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import numpy as np
from comfy.model_base import BaseModel

from .. import world
from ..generate import generate
from ..judge import FACTORS, Judge
from ..model import DemoModel
from .data import write_grid

COUNT = 48


def as_demo(base: BaseModel, clip: comfy.sd.CLIP, vae: comfy.sd.VAE) -> DemoModel:
    """A model in training as the loader would return it."""
    device = comfy.model_management.get_torch_device()
    return DemoModel(comfy.model_patcher.ModelPatcher(base, load_device=device, offload_device=device), clip, vae)


def write_samples(demo: DemoModel, file: Path) -> str:
    """Draw what fixed prompts say into one PNG; return how many pictures are right, factor by factor, for the log."""
    wanted = [world.sample(seed) for seed in range(COUNT)]
    prompts = [world.prompt(factors) for factors in wanted]
    made = generate(demo, prompts, range(COUNT), steps=16, cfg=3.0)
    write_grid(made.permute(0, 3, 1, 2) * 2 - 1, file, 12)
    found = Judge.load().look(made.float().cpu())
    shares = {
        name: np.mean([seen == world.value(f, name) for seen, f in zip(getattr(found, name), wanted, strict=True)])
        for name in FACTORS
    }
    return " ".join(f"{name} {share:.3f}" for name, share in shares.items())
