"""Stage 4: the small ViT, contrastive on two augmented views: CLS by picture, patches by place.

The CLS part is SimCLR's NT-Xent (Chen et al. 2020, arXiv 2002.05709), the patch part its dense form (Wang et al. 2021,
arXiv 2011.09157): the feature at a point of one view should be that of the same point in the other view.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..vit import WIDTH, build_vit
from ..weights import VIT, save_weights
from .data import TRAINING_SEED, pictures
from .loop import Recipe

BATCH = 32
VIEW = 96
POINTS = 24
TEMPERATURE = 0.15
FIRST_SEED = 30 * TRAINING_SEED


class VitStage:
    """The heads that the losses need are thrown away; only the backbone is kept."""

    def __init__(self, device: torch.device, steps: int = 900) -> None:
        self.recipe = Recipe("vit", steps=steps, learning_rate=1e-3, weight_decay=0.05, ema=0.995)
        self.device = device
        torch.manual_seed(4)
        heads = {name: nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, 64)) for name in ("cls", "patch")}
        self.backbone = build_vit()
        self.model = nn.ModuleDict({"backbone": self.backbone, **heads}).to(device)

    def loss(self, step: int) -> Tensor:
        picture_loss, patch_loss = self._losses(range(FIRST_SEED + step * BATCH, FIRST_SEED + (step + 1) * BATCH), step)
        return picture_loss + patch_loss

    def samples(self, folder: Path, step: int) -> str:
        picture_loss, patch_loss = self._losses(range(BATCH), step)
        return f"held-out picture loss {picture_loss:.3f} patch loss {patch_loss:.3f}"

    def export(self) -> None:
        save_weights(VIT, self.backbone.state_dict())

    def _losses(self, seeds: range, step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([4, step])
        images = pictures(seeds)[0].to(self.device)
        first, second = _affine(rng, len(images)), _affine(rng, len(images))
        views = torch.cat([_view(images, first, rng), _view(images, second, rng)])
        with torch.autocast(self.device.type, torch.bfloat16):
            tokens = self.backbone.forward_features(views)
            cls = self.model["cls"](tokens[:, 0])
            patches = self.model["patch"](tokens[:, 1:])
        one, two = F.normalize(cls.float(), dim=-1).chunk(2)
        picture_loss = _contrast(one, two)
        grid = VIEW // 8
        maps = F.normalize(patches.float(), dim=-1).transpose(1, 2).unflatten(2, (grid, grid))
        points = torch.from_numpy(rng.uniform(-0.6, 0.6, (len(images), POINTS, 2)).astype(np.float32)).to(self.device)
        sampled = [_at(m, _into(points, a)) for m, a in zip(maps.chunk(2), (first, second), strict=True)]
        return picture_loss, _contrast(*(F.normalize(s.flatten(0, 1), dim=-1) for s in sampled))


def _affine(rng: np.random.Generator, count: int) -> Tensor:
    """(B, 2, 3): from a view's coordinates to the picture's, both in [-1, 1]."""
    angle, scale = rng.uniform(-0.5, 0.5, count), rng.uniform(0.65, 1.0, count)
    flip = rng.choice([-1.0, 1.0], count)
    shift = rng.uniform(-0.25, 0.25, (count, 2))
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    rows = np.stack([np.stack([cos * flip, -sin, shift[:, 0]], 1), np.stack([sin * flip, cos, shift[:, 1]], 1)], 1)
    return torch.from_numpy(rows.astype(np.float32))


def _view(images: Tensor, affine: Tensor, rng: np.random.Generator) -> Tensor:
    """Crop, turn, flip and scale; jitter brightness, contrast and noise: (B, 3, 96, 96)."""
    grid = F.affine_grid(affine.to(images), [len(images), 3, VIEW, VIEW], align_corners=False)
    view = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    gain, shift = rng.uniform(0.8, 1.2, (len(images), 1, 1, 1)), rng.uniform(-0.1, 0.1, (len(images), 3, 1, 1))
    noise = torch.randn(view.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31)))).to(view)
    return view * torch.from_numpy(gain).to(view) + torch.from_numpy(shift).to(view) + 0.03 * noise


def _into(points: Tensor, affine: Tensor) -> Tensor:
    """Points (B, P, 2) of the picture in the coordinates of a view."""
    matrix, shift = affine[:, :, :2].to(points), affine[:, :, 2].to(points)
    return torch.linalg.solve(matrix, (points - shift[:, None]).transpose(1, 2)).transpose(1, 2)


def _at(maps: Tensor, points: Tensor) -> Tensor:
    """Features (B, P, C) at points of a view; points outside take the border's."""
    found = F.grid_sample(maps, points[:, :, None], padding_mode="border", align_corners=False)
    return found[..., 0].transpose(1, 2)


def _contrast(one: Tensor, two: Tensor) -> Tensor:
    """InfoNCE in both directions between rows of unit vectors; row i of one belongs to row i of the other."""
    logits = one @ two.T / TEMPERATURE
    target = torch.arange(len(one), device=one.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
