"""The judge: a small network that says what a picture of the demo world shows, and where its object is.

It measures pictures; no method under test may use it. Unlike the generating models it knows the withheld shapes and
textures, since it must recognise them in results.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import world
from .weights import JUDGE, load_weights

FACTORS: dict[str, tuple[str, ...]] = {
    "shape": tuple(world.SHAPES),
    "colour": tuple(world.COLOURS),
    "texture": world.TEXTURES,
    "background": tuple(world.BACKGROUNDS),
}


class Verdict(NamedTuple):
    """The names found for each picture, and the object's coverage (B, H, W) in [0, 1]."""

    shape: list[str]
    colour: list[str]
    texture: list[str]
    background: list[str]
    mask: Tensor


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


class JudgeNetwork(nn.Module):
    """A U-shaped network: (B, 3, H, W) in [0, 1] -> logits for each factor and for the mask (B, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([_block(3, 32, 2), _block(32, 64, 2), _block(64, 96, 2), _block(96, 128, 2)])
        self.up = nn.ModuleList([_block(128 + 96, 64, 1), _block(64 + 64, 48, 1), _block(48 + 32, 32, 1)])
        self.mask = nn.Conv2d(32, 4, 1)
        self.heads = nn.ModuleDict({name: nn.Linear(128 * 2 + 96 + 64, len(names)) for name, names in FACTORS.items()})

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        h, levels = images * 2 - 1, []
        for block in self.down:
            h = block(h)
            levels.append(h)
        mask = levels[-1]
        for block, skip in zip(self.up, reversed(levels[:-1]), strict=True):
            mask = block(torch.cat([nn.functional.interpolate(mask, scale_factor=2.0), skip], dim=1))
        logits = nn.functional.pixel_shuffle(self.mask(mask), 2)[:, 0]
        inside = torch.sigmoid(logits.detach())[:, None]
        summary = [levels[-1].mean((2, 3)), levels[-1].amax((2, 3))]
        summary += [_average_inside(level, inside) for level in (levels[2], levels[1])]
        summary = torch.cat(summary, dim=1)
        return {name: head(summary) for name, head in self.heads.items()}, logits


def _average_inside(features: Tensor, inside: Tensor) -> Tensor:
    weight = nn.functional.adaptive_avg_pool2d(inside, (features.shape[-2], features.shape[-1]))
    return (features * weight).sum((2, 3)) / (weight.sum((2, 3)) + 1e-3)


class Judge:
    """The trained network behind names instead of logits."""

    def __init__(self, network: JudgeNetwork) -> None:
        self.network = network.eval()

    @classmethod
    def load(cls) -> Judge:
        """Read the committed weights; raises DemoWeightsError if they are missing or unreadable."""
        network = JudgeNetwork()
        network.load_state_dict(load_weights(JUDGE))
        return cls(network)

    @torch.no_grad()
    def look(self, images: Tensor) -> Verdict:
        """Judge pictures (B, H, W, 3) in [0, 1], H and W multiples of 16."""
        found: dict[str, list[str]] = {name: [] for name in FACTORS}
        masks = []
        for part in images.permute(0, 3, 1, 2).split(32):
            logits, mask = self.network(part)
            masks.append(torch.sigmoid(mask))
            for name, names in FACTORS.items():
                found[name] += [names[i] for i in logits[name].argmax(1).tolist()]
        return Verdict(**found, mask=torch.cat(masks))
