"""What is learned towards beside the pictures themselves: features of them, or a vector given for the token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import objectives
from .model import LearningError, Schedule

GREY = 0.5
"""What stands outside the mask when a backbone looks."""

Decode = Callable[[Tensor], Tensor]
"""Latents (B, C, h, w) as the model knows them -> pictures (B, 3, H, W) in [0, 1], differentiable."""
See = Callable[[Tensor], Tensor]
"""Pictures (B, 3, H, W) in [0, 1] -> features (B, D), differentiable if the pictures require a gradient."""


class Projection(NamedTuple):
    """For "projected": a frozen head C -> D, fitted on other tokens of the encoder named, and a whitened CLS (D,)."""

    encoder: str
    head: nn.Module
    feature: Tensor


@dataclass(frozen=True, eq=False)
class Look:
    """For "features": how a clean latent looks to a backbone, and how the pictures do.

    Attributes:
        decode: see `Decode`.
        see: see `See`.
        wanted: (D,) what it sees in the pictures: `Look.of`.
    """

    decode: Decode
    see: See
    wanted: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, decode: Decode, see: See, pictures: Tensor, masks: Tensor) -> Look:
        """Args: pictures (B, H, W, 3) in [0, 1] and their masks (B, H, W)."""
        found = see(_on_grey(pictures.permute(0, 3, 1, 2), masks[:, None]))
        return cls(decode, see, found.float().mean(0).clone())

    def distance(self, clean: Tensor, mask: Tensor, schedule: Schedule) -> Tensor:
        """`objectives.feature_distance` (B,) of clean estimates (B, C, h, w) inside the masks (B, 1, h, w)."""
        seen = self.see(_on_grey(self.decode(clean), mask))
        return objectives.feature_distance(seen.to(clean.device), self.wanted.to(clean.device), schedule)


@dataclass(frozen=True, eq=False)
class Guides:
    """What a lesson's objectives need beside the model and the pictures; each may be missing.

    Attributes:
        look: for "features".
        token: for "token_mse": encoder -> what its vectors shall be, (C,) for all or (n, C).
        projection: for "projected".
    """

    look: Look | None = None
    token: Mapping[str, Tensor] = field(default_factory=dict)
    projection: Projection | None = None

    def require(self, wanted: Sequence[str], vectors: Mapping[str, Tensor]) -> None:
        """Raise LearningError if one of these objectives lacks its guide, or a guide fits none of the vectors."""
        needed = {"features": self.look, "token_mse": self.token, "projected": self.projection}
        missing = [name for name in wanted if name in needed and not needed[name]]
        if missing:
            raise LearningError(
                f"the objective {', '.join(missing)} needs features of the pictures: connect a feature extractor, or "
                "take another objective"
            )
        for name, target in self.token.items():
            if name not in vectors or target.shape[-1] != vectors[name].shape[1]:
                here = ", ".join(f"{key} of {value.shape[1]}" for key, value in vectors.items())
                raise LearningError(
                    f"the token shall become a vector of {target.shape[-1]} for {name}, but this model has {here}: "
                    "take a backbone of that width, or another objective"
                )

    def token_mse(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """The mean over the encoders with a target, a scalar."""
        found = [objectives.token_mse(vectors[name], target.to(vectors[name])) for name, target in self.token.items()]
        return torch.stack(found).mean()

    def projected(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """`objectives.projected`, a scalar."""
        assert self.projection is not None
        encoder, head, feature = self.projection
        return objectives.projected(vectors[encoder], head, feature.to(vectors[encoder].device))


def _on_grey(pictures: Tensor, masks: Tensor) -> Tensor:
    masks = nn.functional.interpolate(masks.to(pictures), size=pictures.shape[2:], mode="bilinear")
    return pictures * masks + GREY * (1 - masks)
