"""How much is spent on an inversion, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .inversion import Kind
from .model import LearningError
from .trainer import Stage

Quality = Literal["fast", "balanced", "thorough"]

TOKEN_RATE = 1e-2
OFFSET_RATE = 2e-3
APPEARANCE_OBJECTIVES: dict[str, dict[str, float]] = {
    "attention": {"diffusion": 1.0, "attention_distillation": 1.0},
    "moments": {"diffusion": 1.0, "moments": 0.1},
    "diffusion": {"diffusion": 1.0},
}
"""What an appearance is learned by: the diffusion loss, and beside it what the name says."""


@dataclass(frozen=True)
class Spending:
    """What a quality preset buys."""

    batch: int
    rank: int
    vectors: int
    variants: int


SPENDING: dict[Quality, Spending] = {
    "fast": Spending(batch=4, rank=4, vectors=1, variants=48),
    "balanced": Spending(batch=8, rank=8, vectors=2, variants=96),
    "thorough": Spending(batch=16, rank=16, vectors=4, variants=192),
}


def stages(kind: Kind, steps: int, batch: int, objective: str = "attention") -> tuple[Stage, ...]:
    """The token alone for the first fifth, so that it says all a word can; then token and offset together.

    Args:
        objective: for an appearance, one of `APPEARANCE_OBJECTIVES`.
    """
    if steps < 1:
        raise LearningError(f"{steps} steps were asked for, but learning needs at least 1")
    if objective not in APPEARANCE_OBJECTIVES:
        raise LearningError(f"unknown objective {objective!r}: known are {', '.join(APPEARANCE_OBJECTIVES)}")
    wanted = {"diffusion": 1.0, "attention_on_mask": 0.01} if kind == "shape" else APPEARANCE_OBJECTIVES[objective]
    first = steps // 5
    both = Stage("token and offset", steps - first, {"token": TOKEN_RATE / 2, "offset": OFFSET_RATE}, wanted, batch)
    if first == 0:
        return (both,)
    return (Stage("token", first, {"token": TOKEN_RATE}, wanted, batch), both)
