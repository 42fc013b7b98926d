"""What is to be learned from one picture, and the prompts that ask whether it was."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count

import numpy as np

from demo import world
from inversion_core.learning.inversion import Kind

FIRST_SEED = 420_000
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
        return _wanted(self.factors, self.kind, self.seed, number)


@dataclass(frozen=True)
class Newcomer:
    """One picture of which neither shape nor texture is known to the model: both are to be learned from it."""

    seed: int

    @cached_property
    def factors(self) -> world.Factors:
        """Of the picture."""
        name = world.WITHHELD_SHAPES[self.seed % len(world.WITHHELD_SHAPES)]
        return world.sample(self.seed, shapes=(name,), textures=world.WITHHELD_TEXTURES)

    def wanted(self, kind: Kind, number: int) -> list[Wanted]:
        """So many prompts with the shape's or the appearance's token, and something else for the rest."""
        return _wanted(self.factors, kind, self.seed, number)

    def wanted_together(self, number: int) -> list[Wanted]:
        """So many prompts with both tokens, on other backgrounds."""
        return _together(self.wanted("shape", number), self.factors.appearance)


def newcomers(number: int, tuning: bool) -> list[Newcomer]:
    """The first so many to judge, or to tune on."""
    first = (TUNING_SEED if tuning else FIRST_SEED) + 1000
    return [Newcomer(seed) for seed in range(first, first + number)]


def _wanted(own: world.Factors, kind: Kind, seed: int, number: int) -> list[Wanted]:
    rng = np.random.default_rng([seed, 7])
    found = []
    for index in range(number):
        other = world.sample(int(rng.integers(20_000_000, 30_000_000)))
        while other.shape == own.shape or _alike(other.appearance, own.appearance):
            other = world.sample(int(rng.integers(20_000_000, 30_000_000)))
        look, token = other.appearance, f"<{TOKENS[kind]}>"
        if kind == "shape":
            text, truth = f"a {look.colour} {look.texture} {token}", replace(other, shape=own.shape)
        else:
            text, truth = f"a {token} {other.shape}", replace(other, appearance=own.appearance)
        found.append(Wanted(f"{text} on {other.background}", 1000 * seed + index, truth))
    return found


def _alike(a: world.Appearance, b: world.Appearance) -> bool:
    return a.colour == b.colour or a.texture == b.texture


def concepts(kind: Kind, number: int, tuning: bool) -> list[Concept]:
    """The first so many to judge, or to tune on."""
    first = TUNING_SEED if tuning else FIRST_SEED
    return [Concept(kind, seed) for seed in range(first, first + number)]


def together(shape: Concept, appearance: Concept, number: int) -> list[Wanted]:
    """Prompts that ask for both by their tokens alone."""
    return _together(shape.wanted(number), appearance.factors.appearance)


def _together(wanted: list[Wanted], look: world.Appearance) -> list[Wanted]:
    tokens = f"a <{TOKENS['appearance']}> <{TOKENS['shape']}>"
    return [
        Wanted(f"{tokens} on {one.truth.background}", one.seed, replace(one.truth, appearance=look)) for one in wanted
    ]
