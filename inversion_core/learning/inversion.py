"""What learning yields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .model import LearningError
from .token import require_name

Kind = Literal["shape", "appearance"]


class LowRankWeights(NamedTuple):
    """A change of one linear layer's weight: ``up @ down``, with up (out, r) and down (r, in)."""

    up: Tensor
    down: Tensor


@dataclass(frozen=True, eq=False)
class Inversion:
    """A learned shape or appearance. Immutable; all tensors float32 on the CPU.

    Attributes:
        kind: what was learned.
        name: stands as ``<name>`` in prompts.
        family: of the model it was learned for; no other can use it.
        token: text encoder -> learned vectors (n, C).
        initial: text encoder -> the vectors (n, C) of the words the token began as.
        offset: layer's name -> its change.
        settings: how it was learned, readable and JSON-like.
        pictures: hash of the pictures and masks it was learned from.
        preview: uint8 (H, W, 3), a picture to show; or None.
    """

    kind: Kind
    name: str
    family: str
    token: Mapping[str, Tensor]
    initial: Mapping[str, Tensor]
    offset: Mapping[str, LowRankWeights] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    pictures: str = ""
    preview: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("shape", "appearance"):
            raise LearningError(f"an inversion's kind is 'shape' or 'appearance', not {self.kind!r}")
        require_name(self.name)
        if {key: value.shape for key, value in self.token.items()} != {
            key: value.shape for key, value in self.initial.items()
        }:
            raise LearningError(
                "the token and what it began as differ in encoders or in size: the inversion is damaged"
            )

    def vectors(self, strength: float) -> dict[str, Tensor]:
        """The token at a strength: 0 is the words it began as, 1 what was learned; beyond 1 it is exaggerated."""
        return {key: torch.lerp(self.initial[key], learned, strength) for key, learned in self.token.items()}

    def require_family(self, family: str) -> None:
        """Raise LearningError if the model at hand is of another family."""
        if self.family != family:
            raise LearningError(
                f"the inversion <{self.name}> was learned for {self.family}, but this model is {family}: "
                f"load a model of {self.family}, or learn it again on this one"
            )
