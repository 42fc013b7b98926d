"""What the generating stages learn from: cached latents of the training vocabulary, their captions and weights."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from comfy.sd import VAE
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from .. import world
from .data import TRAINING_SEED, pictures

BATCH = 32
PICTURES = 24_000
DROP_ALL, DROP_WORD = 0.1, 0.06
LEARNED_LAST = {"striped": 3.0}
"""How much oftener than the others these textures are drawn: straight stripes take the longest."""
OBJECT_WEIGHT = 3.0
"""How much more an error inside the object counts. Textures are learned last, and only the object has one."""


class Batch(NamedTuple):
    """Pictures of one step: which ones, their latents, noise for each, (B, 4, 16, 16), and their places' weights."""

    chosen: np.ndarray
    clean: Tensor
    noise: Tensor
    weight: Tensor

    def error(self, made: Tensor, target: Tensor) -> Tensor:
        """The mean squared error, the object's counted more than the background's."""
        return ((made.float() - target).square() * self.weight).mean() / self.weight.mean()


class Latents:
    """All training pictures as latents. What is slow to make is kept in `folder` and made only once."""

    def __init__(self, folder: Path, vae: VAE, device: torch.device) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.device = device
        self.latents = _latents(folder / "latents.safetensors", vae).to(device)
        self.weights = _weights(folder / "objects.safetensors").to(device)
        self.factors = [world.sample(TRAINING_SEED + index) for index in range(PICTURES)]
        shares = np.array([LEARNED_LAST.get(f.appearance.texture, 1.0) for f in self.factors])
        self.shares = shares / shares.sum()

    def draw(self, rng: np.random.Generator, step: int) -> Batch:
        """The batch of a step."""
        chosen = rng.choice(PICTURES, BATCH, p=self.shares)
        index = torch.from_numpy(chosen)
        clean = self.latents[index].float()
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(step)).to(clean)
        return Batch(chosen, clean, noise, self.weights[index].float())

    def captions(self, batch: Batch, rng: np.random.Generator) -> list[str]:
        """A caption for each picture, words left out at random."""
        return [caption(self.factors[int(index)], rng) for index in batch.chosen]


def caption(factors: world.Factors, rng: np.random.Generator) -> str:
    """The picture's caption, words left out at random; a shape left out is called "shape"."""
    if rng.random() < DROP_ALL:
        return ""
    colour, texture, shape, background = rng.random(4) < DROP_WORD
    words = ["a"]
    words += [] if colour else [factors.appearance.colour]
    words += [] if texture else [factors.appearance.texture]
    words += ["shape" if shape else factors.shape]
    words += [] if background else ["on", factors.background]
    return " ".join(words)


def _latents(file: Path, vae: VAE) -> Tensor:
    if not file.is_file():
        parts = []
        for first in tqdm(range(0, PICTURES, 64), desc="latents", mininterval=10):
            seeds = range(TRAINING_SEED + first, TRAINING_SEED + min(first + 64, PICTURES))
            real = ((pictures(seeds)[0] + 1) / 2).permute(0, 2, 3, 1)
            with torch.no_grad():
                parts.append(vae.encode(real).half())
        save_file({"latents": torch.cat(parts)}, file)
    return load_file(file)["latents"]


def _weights(file: Path) -> Tensor:
    """How much each place of each picture counts: (PICTURES, 1, 16, 16), from 1 to 1 + OBJECT_WEIGHT."""
    if not file.is_file():
        seeds = tqdm(range(TRAINING_SEED, TRAINING_SEED + PICTURES), desc="objects", mininterval=10)
        masks = torch.stack([torch.from_numpy(world.mask(world.sample(seed))).half() for seed in seeds])
        save_file({"coverage": nn.functional.avg_pool2d(masks[:, None].float(), 8).half()}, file)
    return 1 + OBJECT_WEIGHT * load_file(file)["coverage"]
