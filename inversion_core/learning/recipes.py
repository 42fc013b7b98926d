"""How much is spent on an inversion, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .inversion import Kind
from .model import LearningError
from .plan import Plan
from .trainer import Stage

Quality = Literal["fast", "balanced", "thorough"]

TOKEN_RATE = 1e-2
OFFSET_RATE: dict[Kind, float] = {"shape": 6e-3, "appearance": 2e-3}
LEVELS: dict[Kind, tuple[float, float]] = {"shape": (0.4, 1.0), "appearance": (0.0, 0.8)}
"""An outline is decided while there is much noise: below, a shape's lesson would learn the paint of its variants, and
above, an appearance's their outlines."""
APPEARANCE_OBJECTIVES: dict[str, dict[str, float]] = {
    "attention": {"diffusion": 1.0, "attention_distillation": 1.0},
    "moments": {"diffusion": 1.0, "moments": 0.1},
    "diffusion": {"diffusion": 1.0},
    "features": {"diffusion": 1.0, "features": 0.1},
    "token_mse": {"diffusion": 1.0, "token_mse": 1.0},
}
"""What an appearance is learned by: the diffusion loss, and beside it what the name says."""
NEED_FEATURES = ("features", "token_mse")
"""Those of them that need a feature extractor."""


@dataclass(frozen=True)
class Spending:
    """What a quality preset buys."""

    batch: int
    rank: int
    vectors: int
    variants: int


SPENDING: dict[Quality, Spending] = {
    "fast": Spending(batch=8, rank=16, vectors=1, variants=64),
    "balanced": Spending(batch=16, rank=16, vectors=2, variants=256),
    "thorough": Spending(batch=32, rank=32, vectors=4, variants=512),
}


def stages(kind: Kind, steps: int, batch: int, objective: str = "attention") -> tuple[Stage, ...]:
    """For a shape token and offset together: no word says a new outline. For an appearance the token alone first, for a
    tenth of the steps, so that it says what a word can.

    Args:
        objective: for an appearance, one of `APPEARANCE_OBJECTIVES`.
    """
    if steps < 1:
        raise LearningError(f"{steps} steps were asked for, but learning needs at least 1")
    if objective not in APPEARANCE_OBJECTIVES:
        raise LearningError(f"unknown objective {objective!r}: known are {', '.join(APPEARANCE_OBJECTIVES)}")
    wanted = {"diffusion": 1.0, "attention_on_mask": 0.01} if kind == "shape" else APPEARANCE_OBJECTIVES[objective]
    levels = LEVELS[kind]
    first = steps // 10 if kind == "appearance" else 0
    rates = {"token": TOKEN_RATE / 2, "offset": OFFSET_RATE[kind]}
    both = Stage("token and offset", steps - first, rates, wanted, batch, levels=levels)
    if first == 0:
        return (both,)
    return (Stage("token", first, {"token": TOKEN_RATE}, wanted, batch, levels=levels), both)


def plan_of(
    kind: Kind,
    name: str,
    class_word: str,
    steps: int,
    quality: Quality = "balanced",
    *,
    objective: str = "attention",
    seed: int = 0,
    beside: str = "",
) -> Plan:
    """What somebody's settings ask for; see `Plan` and `stages`, which raise LearningError where they make no sense."""
    spent = SPENDING[quality]
    return Plan(
        kind=kind,
        name=name,
        class_word=class_word,
        stages=stages(kind, steps, spent.batch, objective),
        vectors=spent.vectors,
        rank=spent.rank,
        variants=spent.variants,
        seed=seed,
        beside=beside,
    )
