"""Stage 3: the judge, on the whole vocabulary, blurred and noised as generated pictures may be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .. import world
from ..judge import FACTORS, Judge, JudgeNetwork
from ..model import load_vae
from ..weights import JUDGE, save_weights
from .data import TRAINING_SEED, pictures
from .loop import Recipe

BATCH = 32
FIRST_SEED = 10 * TRAINING_SEED


class JudgeStage:
    """Cross-entropy on every factor and on the mask. A quarter of each batch has been through the autoencoder."""

    def __init__(self, device: torch.device, steps: int = 600) -> None:
        self.recipe = Recipe("judge", steps=steps, learning_rate=2e-3, ema=0.998)
        self.device = device
        torch.manual_seed(2)
        self.model = JudgeNetwork().to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.first_stage = load_vae().first_stage_model.to(device)

    def loss(self, step: int) -> Tensor:
        first = FIRST_SEED + step * BATCH
        images, factors, masks = _everything(range(first, first + BATCH))
        images = images.to(self.device, memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16):
            images = self._worn(images, step)
            logits, mask = self.model(images)
        loss = nn.functional.binary_cross_entropy_with_logits(mask.float(), masks.to(self.device))
        for name, names in FACTORS.items():
            target = torch.tensor([names.index(world.value(f, name)) for f in factors], device=self.device)
            loss = loss + nn.functional.cross_entropy(logits[name].float(), target)
        return loss

    @torch.no_grad()
    def _worn(self, images: Tensor, step: int) -> Tensor:
        coded_rows = BATCH // 4
        rng = np.random.default_rng([3, step])
        coded = self.first_stage.decode(self.first_stage.encode(images[:coded_rows] * 2 - 1))
        images = torch.cat([(coded.float() + 1) / 2, images[coded_rows:]])
        if rng.random() < 0.3:
            images = nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(step)).to(images)
        shift = torch.from_numpy(rng.uniform(-0.03, 0.03, (BATCH, 3, 1, 1))).to(images)
        return (images + shift + noise * rng.uniform(0, 0.04)).clamp(0, 1)

    def samples(self, folder: Path, step: int) -> str:
        images, factors, masks = _everything(range(512))
        verdict = Judge(self.model).look(images.permute(0, 2, 3, 1).to(self.device))
        figures = []
        for name in FACTORS:
            right = [found == world.value(f, name) for found, f in zip(getattr(verdict, name), factors, strict=True)]
            figures.append(f"{name} {np.mean(right):.4f}")
        a, b = verdict.mask.cpu() > 0.5, masks > 0.5
        iou = (a & b).sum((1, 2)) / (a | b).sum((1, 2))
        return " ".join([*figures, f"iou {iou.mean():.4f}"])

    def export(self) -> None:
        save_weights(JUDGE, self.model.state_dict())


def _everything(seeds: range) -> tuple[Tensor, list[world.Factors], Tensor]:
    images, factors = pictures(seeds, shapes=tuple(world.SHAPES), textures=world.TEXTURES)
    masks = torch.from_numpy(np.stack([world.mask(f) for f in factors]))
    return (images + 1) / 2, factors, masks
