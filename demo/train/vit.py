"""Stage 4: the small ViT, contrastive on two renderings: CLS by appearance, patches by place on the object.

No label is used, but the augmentation is the world's own renderer, which can do what crops and colour jitter only
imitate: the second view of a picture has its shape in another pose, and another picture's appearance and background.
Patches are to see the same in both (the dense contrast of Wang et al. 2021, arXiv 2011.09157, with neighbours as soft
targets), so they learn places and forget colours; CLS is to see the same in two pictures of one appearance (NT-Xent,
Chen et al. 2020, arXiv 2002.05709), so it learns colours and forgets shapes. Withheld shapes and textures are never
rendered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import world
from ..shapes import signed_distance
from ..vit import PATCH, WIDTH, build_vit
from ..weights import VIT, load_weights, save_weights
from .data import TRAINING_SEED
from .loop import Recipe

BATCH = 32
VIEWS = (96, 128)
"""Sides of the renderings in pixels, one for each step."""
POINTS = 48
REACH = 1.2
"""How far from the object's centre points are taken, in radii."""
NEAR = 0.12
"""Width of the soft target: how far apart two points may be and still be the same place, in radii."""
TEMPERATURE = 0.1
FIRST_SEED = 30 * TRAINING_SEED


class VitStage:
    """The head of the CLS loss is thrown away; tokens and the last block's keys are compared as they will be used."""

    def __init__(self, device: torch.device, steps: int = 3000) -> None:
        self.recipe = Recipe("vit", steps=steps, learning_rate=1e-3, weight_decay=0.05, ema=0.995)
        self.device = device
        torch.manual_seed(4)
        head = nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, 64))
        self.backbone = build_vit()
        self.model = nn.ModuleDict({"backbone": self.backbone, "cls": head}).to(device)
        blocks: Any = self.backbone.blocks
        for block in blocks:
            # On a CPU in bfloat16 the fused kernel's backward takes longer than all the rest.
            block.attn.fused_attn = device.type != "cpu"
        blocks[-1].attn.qkv.register_forward_hook(self._keep_keys)

    def warm_start(self) -> None:
        """Begin with the committed backbone; the head begins anew."""
        self.backbone.load_state_dict(load_weights(VIT))

    def loss(self, step: int) -> Tensor:
        first = FIRST_SEED + 2 * step * BATCH
        return torch.stack(self._losses(range(first, first + 2 * BATCH), step)).sum()

    def samples(self, folder: Path, step: int) -> str:
        figures = zip(("appearance", "tokens", "keys"), self._losses(range(2 * BATCH), step), strict=True)
        return "held-out losses: " + ", ".join(f"{name} {float(value):.3f}" for name, value in figures)

    def export(self) -> None:
        save_weights(VIT, self.backbone.state_dict())

    def _keep_keys(self, _layer: nn.Module, _given: Any, qkv: Tensor) -> None:
        self._keys = qkv.chunk(3, dim=-1)[1]

    def _losses(self, seeds: range, step: int) -> list[Tensor]:
        """Of the CLS, the tokens and the keys. The first half of the seeds are pictures, the other half gives poses."""
        rng = np.random.default_rng([4, step])
        drawn = [world.sample(seed) for seed in seeds]
        first, poses = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
        looks = [*first[1:], first[0]]  # the second view of each has the next one's appearance
        second = [
            replace(world.compose(one, look, look), pose=other.pose)
            for one, look, other in zip(first, looks, poses, strict=True)
        ]
        side = int(rng.choice(VIEWS))
        views = _jittered(_rendered([*first, *second], side).to(self.device), rng)
        with torch.autocast(self.device.type, torch.bfloat16):
            tokens = self.backbone.forward_features(views)
            cls = self.model["cls"](tokens[:, 0])
        one, two = F.normalize(cls.float(), dim=-1).chunk(2)
        losses = [_contrast(two, one.roll(-1, 0))]
        points, same = _points(first, rng)
        seen = [_into(points, [one.pose for one in view]).to(self.device) for view in (first, second)]
        for descriptors in (tokens, self._keys):
            grid = (side // PATCH, side // PATCH)
            maps = descriptors[:, 1:].float().transpose(1, 2).unflatten(2, grid)
            one, two = (_at(half, places) for half, places in zip(maps.chunk(2), seen, strict=True))
            losses.append(_dense(one, two, same.to(self.device)))
        return losses


def _rendered(factors: Sequence[world.Factors], side: int) -> Tensor:
    """(B, 3, side, side) in [-1, 1]."""
    images = np.stack([world.render(one, side).image for one in factors])
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


def _jittered(views: Tensor, rng: np.random.Generator) -> Tensor:
    """Other brightness and contrast, and noise."""
    gain, shift = rng.uniform(0.8, 1.2, (len(views), 1, 1, 1)), rng.uniform(-0.1, 0.1, (len(views), 3, 1, 1))
    noise = torch.randn(views.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31)))).to(views)
    return views * torch.from_numpy(gain).to(views) + torch.from_numpy(shift).to(views) + 0.03 * noise


def _points(factors: Sequence[world.Factors], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Points (B, P, 2) in the coordinates of each object, and how much one counts as the other: (B, P, P), rows sum
    to 1. Inside and outside of the object are never the same place."""
    points = rng.uniform(-REACH, REACH, (len(factors), POINTS, 2)).astype(np.float32)
    inside = np.stack([signed_distance(f.shape, *at.T) < 0 for f, at in zip(factors, points, strict=True)])
    apart = np.square(points[:, :, None] - points[:, None]).sum(-1) / (2 * NEAR**2)
    apart[inside[:, :, None] != inside[:, None]] = np.inf
    return torch.from_numpy(points), torch.from_numpy(-apart).softmax(dim=2)


def _into(points: Tensor, poses: Sequence[world.Pose]) -> Tensor:
    """Points (B, P, 2) of the objects in the coordinates of a picture, in [-1, 1] where they lie in it."""
    angle, radius, x, y = torch.tensor([[p.rotation, p.radius, p.x, p.y] for p in poses]).T[:, :, None]
    u, v = points.unbind(2)
    across = x + radius * (u * angle.cos() - v * angle.sin())
    down = y + radius * (u * angle.sin() + v * angle.cos())
    return torch.stack((across, down), dim=2) * 2 - 1


def _at(maps: Tensor, points: Tensor) -> Tensor:
    """Features (B, P, C) at points of a view; points outside take the border's."""
    found = F.grid_sample(maps, points[:, :, None], padding_mode="border", align_corners=False)
    return found[..., 0].transpose(1, 2)


def _dense(one: Tensor, two: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy in both directions between the points (B, P, C) of two views; negatives are of the same picture."""
    logits = F.normalize(one, dim=2) @ F.normalize(two, dim=2).transpose(1, 2) / TEMPERATURE
    return -((logits.log_softmax(2) + logits.transpose(1, 2).log_softmax(2)) * same).sum(2).mean() / 2


def _contrast(one: Tensor, two: Tensor) -> Tensor:
    """InfoNCE in both directions between rows of unit vectors; row i of one belongs to row i of the other."""
    logits = one @ two.T / TEMPERATURE
    target = torch.arange(len(one), device=one.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
