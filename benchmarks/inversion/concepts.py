"""What is to be learned from one picture, and the prompts that ask whether it was."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count

import numpy as np

from demo import world
from inversion_core.learning.inversion import Kind

FIRST_SEED = 410_000
"""Judged concepts. Disjoint from training (a million and up), the other benchmarks and the tuning concepts."""
TUNING_SEED = 60_000
"""Concepts that values may be chosen on."""
TOKENS: dict[Kind, str] = {"shape": "form", "appearance": "look"}


@dataclass(frozen=True)
class Wanted:
    """A prompt, the seed of its noise, and the picture that would be right but for its pose."""

    prompt: str
    seed: int
    truth: world.Factors


@dataclass(frozen=True)
class Concept:
    """One picture to learn a shape or an appearance from, a pure function of kind and seed.

    A shape is one of the withheld ones; an appearance is the withheld texture in one of the colours, on a known shape.
    """

    kind: Kind
    seed: int

    @cached_property
    def factors(self) -> world.Factors:
        """Of the picture."""
        if self.kind == "shape":
            name = world.WITHHELD_SHAPES[self.seed % len(world.WITHHELD_SHAPES)]
            return world.sample(self.seed, shapes=(name,))
        colours = tuple(world.COLOURS)
        drawn = (world.sample(10 * self.seed + 10_000_000 + n, textures=world.WITHHELD_TEXTURES) for n in count())
        return next(one for one in drawn if one.appearance.colour == colours[self.seed % len(colours)])

    def wanted(self, number: int) -> list[Wanted]:
        """So many prompts that say something else about everything but the concept."""
        rng, own = np.random.default_rng([self.seed, 7]), self.factors
        found = []
        for index in range(number):
            other = world.sample(int(rng.integers(20_000_000, 30_000_000)))
            while other.shape == own.shape or _alike(other.appearance, own.appearance):
                other = world.sample(int(rng.integers(20_000_000, 30_000_000)))
            look, token = other.appearance, f"<{TOKENS[self.kind]}>"
            if self.kind == "shape":
                text, truth = f"a {look.colour} {look.texture} {token}", replace(other, shape=own.shape)
            else:
                text, truth = f"a {token} {other.shape}", replace(other, appearance=own.appearance)
            found.append(Wanted(f"{text} on {other.background}", 1000 * self.seed + index, truth))
        return found


def _alike(a: world.Appearance, b: world.Appearance) -> bool:
    return a.colour == b.colour or a.texture == b.texture


def concepts(kind: Kind, number: int, tuning: bool) -> list[Concept]:
    """The first so many to judge, or to tune on."""
    first = TUNING_SEED if tuning else FIRST_SEED
    return [Concept(kind, seed) for seed in range(first, first + number)]


def together(shape: Concept, appearance: Concept, number: int) -> list[Wanted]:
    """Prompts that ask for both by their tokens alone."""
    tokens = f"a <{TOKENS['appearance']}> <{TOKENS['shape']}>"
    return [
        Wanted(
            f"{tokens} on {one.truth.background}",
            one.seed,
            replace(one.truth, appearance=appearance.factors.appearance),
        )
        for one in shape.wanted(number)
    ]
