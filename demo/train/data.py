"""Batches of the demo world as tensors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import world

TRAINING_SEED = 1_000_000
"""Training pictures have seeds from here on; every benchmark uses seeds below."""


def pictures(seeds: Iterable[int], **vocabulary: Any) -> tuple[Tensor, list[world.Factors]]:
    """Render the pictures of these seeds: (B, 3, 128, 128) in [-1, 1], with their factors."""
    factors = [world.sample(seed, **vocabulary) for seed in seeds]
    images = np.stack([world.render(f).image for f in factors])
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1, factors


def write_grid(images: Tensor, path: Path, columns: int) -> None:
    """Save (B, 3, H, W) in [-1, 1] as one PNG with so many columns."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    rows = [np.concatenate(list(pixels[i : i + columns]), axis=1) for i in range(0, len(pixels), columns)]
    Image.fromarray(np.concatenate([row for row in rows if row.shape == rows[0].shape], axis=0)).save(path)


def reset(module: torch.nn.Module) -> None:
    """Initialise the layers of a ComfyUI model: its own classes turn `reset_parameters` into nothing."""
    for layer in module.modules():
        for kind in type(layer).__mro__:
            if kind.__module__.startswith("torch.nn.") and "reset_parameters" in vars(kind):
                kind.reset_parameters(layer)  # pyright: ignore[reportAttributeAccessIssue]
                break
