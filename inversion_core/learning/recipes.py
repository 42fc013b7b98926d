"""How much is spent on an inversion, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .inversion import Kind
from .model import PROJECTIONS, LearningError
from .offset import EVERYWHERE, Sites
from .plan import Framing, Plan
from .trainer import Stage

Quality = Literal["fast", "balanced", "thorough"]

TOKEN_RATE = 1e-2
OFFSET_RATE: dict[Kind, float] = {"shape": 4e-3, "appearance": 7e-4}
LEVELS: dict[Kind, tuple[float, float]] = {"shape": (0.4, 1.0), "appearance": (0.0, 0.8)}
"""An outline is decided while there is much noise: below, a shape's lesson would learn the paint of its variants, and
above, an appearance's their outlines."""
FIRST = 4
"""One in so many of an appearance's steps is the token's alone, at all noise levels: the colour is decided above
`LEVELS`, where a word may say it, and an offset would learn outlines."""
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

SITES: dict[str, dict[Kind, Sites | None]] = {
    "default": {"shape": None, "appearance": None},
    "everything": dict.fromkeys(get_args(Kind), EVERYWHERE),
    "all attention": dict.fromkeys(get_args(Kind), Sites(("self", "cross"), ("to_q", "to_k", "to_v"))),
    "self-attention": dict.fromkeys(get_args(Kind), Sites(("self",))),
    "cross-attention": dict.fromkeys(get_args(Kind), Sites(("cross",))),
    "B-LoRA (SDXL)": {
        "shape": Sites(("self", "cross"), PROJECTIONS, ("output_blocks.0.1.",)),
        "appearance": Sites(("self", "cross"), PROJECTIONS, ("output_blocks.1.1.",)),
    },
}
"""Where an offset may go, by name; those of one kind of attention are its keys and values. B-LoRA: content and style in
one block of SDXL each (Frenkel et al., arXiv 2403.14572)."""


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


def stages(
    kind: Kind, steps: int, batch: int, objective: str = "attention", learning_rate: float = 0.0
) -> tuple[Stage, ...]:
    """For a shape token and offset together: no word says a new outline. For an appearance the token alone first, so
    that it says what a word can.

    Args:
        objective: for an appearance, one of `APPEARANCE_OBJECTIVES`.
        learning_rate: of the offset; 0: `OFFSET_RATE`.
    """
    if steps < 1:
        raise LearningError(f"{steps} steps were asked for, but learning needs at least 1")
    if learning_rate < 0:
        raise LearningError(f"the learning rate is {learning_rate}, but it must be above 0, or 0 for the default")
    if objective not in APPEARANCE_OBJECTIVES:
        raise LearningError(f"unknown objective {objective!r}: known are {', '.join(APPEARANCE_OBJECTIVES)}")
    wanted = {"diffusion": 1.0, "attention_on_mask": 0.01} if kind == "shape" else APPEARANCE_OBJECTIVES[objective]
    levels = LEVELS[kind]
    first = steps // FIRST if kind == "appearance" else 0
    rates = {"token": TOKEN_RATE / 2, "offset": learning_rate or OFFSET_RATE[kind]}
    both = Stage("token and offset", steps - first, rates, wanted, batch, levels=levels)
    if first == 0:
        return (both,)
    return (Stage("token", first, {"token": TOKEN_RATE}, wanted, batch), both)


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
    sites: str = "default",
    rank: int = 0,
    learning_rate: float = 0.0,
    framing: Framing = "centred",
) -> Plan:
    """What somebody's settings ask for; see `Plan` and `stages`, which raise LearningError where they make no sense.

    Args:
        sites: one of `SITES`.
        rank: of the offset; 0: what `quality` buys.
    """
    spent = SPENDING[quality]
    if sites not in SITES:
        raise LearningError(f"unknown sites {sites!r}: known are {', '.join(SITES)}")
    return Plan(
        kind=kind,
        name=name,
        class_word=class_word,
        stages=stages(kind, steps, spent.batch, objective, learning_rate),
        vectors=spent.vectors,
        rank=rank or spent.rank,
        variants=spent.variants,
        seed=seed,
        beside=beside,
        sites=SITES[sites][kind],
        framing=framing,
    )
