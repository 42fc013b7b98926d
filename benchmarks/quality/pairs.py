"""The pairs: a withheld shape A, an appearance B, and the true composition of both on A's background."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from demo import world

FIRST_SEED = 500_000
"""Judged pairs. With what they draw B and C from, disjoint from training, from the other benchmarks and from tuning."""
TUNING_SEED = 50_000
"""Pairs that values may be chosen on."""


@dataclass(frozen=True)
class Pair:
    """One task, a pure function of its seed.

    The shape's picture has another texture and colour than the appearance's, else there would be nothing to show.
    """

    seed: int

    @cached_property
    def a(self) -> world.Factors:
        """Whose shape and place: a shape that no generating model has seen."""
        return world.sample(self.seed, shapes=world.WITHHELD_SHAPES, textures=world.TEXTURES)

    @cached_property
    def b(self) -> world.Factors:
        """Whose appearance: another colour and another texture than A's, neither of them plain nor withheld."""
        textures = tuple(t for t in world.TRAINED_TEXTURES if t not in ("plain", self.a.appearance.texture))
        for attempt in range(100):
            found = world.sample(self.seed + 10_000_000 + attempt, textures=textures)
            if found.appearance.colour != self.a.appearance.colour:
                return found
        raise RuntimeError(f"no second colour was drawn for pair {self.seed}")  # one chance in 8**100

    @cached_property
    def c(self) -> world.Factors:
        """Where it is placed: another background than A's."""
        for attempt in range(100):
            found = world.sample(self.seed + 20_000_000 + attempt)
            if found.background != self.a.background:
                return found
        raise RuntimeError(f"no second background was drawn for pair {self.seed}")

    @cached_property
    def shape(self) -> world.Rendered:
        """A's picture."""
        return world.render(self.a)

    @cached_property
    def appearance(self) -> world.Rendered:
        """B's picture."""
        return world.render(self.b)

    @cached_property
    def truth(self) -> world.Rendered:
        """The true composition."""
        return world.render(world.compose(self.a, self.b, self.a))

    @cached_property
    def place(self) -> np.ndarray:
        """C's picture without an object."""
        return world.background(self.c)

    @cached_property
    def placed_truth(self) -> world.Rendered:
        """The true composition on C's background."""
        return world.render(world.compose(self.a, self.b, self.c))

    @cached_property
    def placed_source(self) -> world.Rendered:
        """A's own object on C's background."""
        return world.render(world.compose(self.a, self.a, self.c))


def pairs(count: int, tuning: bool) -> list[Pair]:
    """The first so many pairs to judge, or to tune on."""
    first = TUNING_SEED if tuning else FIRST_SEED
    return [Pair(seed) for seed in range(first, first + count)]


def batch(rendered: world.Rendered) -> Tensor:
    """A picture as ComfyUI's IMAGE (1, H, W, 3)."""
    return torch.from_numpy(np.ascontiguousarray(rendered.image))[None]
