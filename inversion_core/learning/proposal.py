"""A mask for a picture that came without one, from what the model itself sees in it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from . import objectives
from .model import Attention, LearningError, LearningModel
from .offset import recorded

LEVEL = 0.3
"""Of the noise the model looks through: little, so that outlines are still there, and not none, which it never saw."""
OBJECT = "object"
SEEDS = 0.2
"""Share of the places that read the class word most, which the object's group begins as."""
ROUNDS = 10
LARGEST = 4096
"""Tokens of the finest attention that is asked."""


@torch.no_grad()
def propose_masks(model: LearningModel, latents: Tensor, class_word: str, size: tuple[int, int]) -> Tensor:
    """Where the object is: masks (B, H, W), 1 inside and 0 outside.

    The picture's places are parted in two by the keys of the decoder's self-attention: one group begins as the
    frame's border, the other as the places that read the class word most; each place goes to the group it is closer to,
    for a few rounds. So an object that fills the frame, or lies at its edge, is found badly: look at the proposal.

    Args:
        latents: (B, C, h, w), clean.
        size: (H, W) of the pictures. The model sees no finer than its attention; in between it is interpolated.

    Raises:
        LearningError: the class word gives no token.
    """
    latents = latents.to(model.device)
    keys, reads = _seen(model, latents, class_word)
    grid = objectives.grid_of(keys.shape[1], (latents.shape[-2], latents.shape[-1]))
    found = torch.stack([_parted(*one, grid) for one in zip(keys, reads, strict=True)])
    large = F.interpolate(found[:, None], size=size, mode="bicubic", align_corners=False)
    return (large[:, 0] > 0).float()


def _seen(model: LearningModel, latents: Tensor, class_word: str) -> tuple[Tensor, Tensor]:
    """For each place of the finest decoder attention: its keys (B, N, D), and how much it reads the word (B, N)."""
    attentions = {name: one for name, one in model.attentions().items() if one.part == "decoder"}
    layers = {f"{name}.{part}": one.projections[part] for name, one in attentions.items() for part in ("to_q", "to_k")}
    words = model.words(class_word)
    if any(len(vectors) == 0 for vectors in words.values()):
        raise LearningError("the class word gives no token: name what is in the picture, such as 'chair'")
    level = torch.full((len(latents),), LEVEL, device=latents.device)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    conditioning = model.encode([f"a <{OBJECT}>"] * len(latents), {OBJECT: words})
    with recorded(layers) as seen:
        model.predict(objectives.noised(latents, noise, model.schedule(level)), level, conditioning)
    tokens = max(n for n in (seen[f"{name}.to_q"].shape[1] for name in attentions) if n <= LARGEST)
    return (
        torch.cat([F.normalize(one.float(), dim=2) for one in _of(attentions, seen, "self", "to_k", tokens)], dim=2),
        torch.stack(
            [
                objectives.attention_map(seen[f"{name}.to_q"], seen[f"{name}.to_k"], places, attentions[name].heads)
                for places in (conditioning.places[OBJECT],)
                for name in _names(attentions, seen, "cross", tokens)
            ]
        ).mean(0),
    )


def _names(attentions: Mapping[str, Attention], seen: Mapping[str, Tensor], kind: str, tokens: int) -> list[str]:
    return [n for n, one in attentions.items() if one.kind == kind and seen[f"{n}.to_q"].shape[1] == tokens]


def _of(
    attentions: Mapping[str, Attention], seen: Mapping[str, Tensor], kind: str, part: str, tokens: int
) -> list[Tensor]:
    return [seen[f"{name}.{part}"] for name in _names(attentions, seen, kind, tokens)]


def _parted(keys: Tensor, reads: Tensor, grid: tuple[int, int]) -> Tensor:
    """How much closer each place (h, w) is to the object's group than to the border's; above 0 it belongs to it."""
    border = torch.zeros(grid, dtype=torch.bool, device=keys.device)
    border[[0, -1]] = True
    border[:, [0, -1]] = True
    outside = border.flatten()
    inside = ~outside & (reads >= torch.quantile(reads[~outside], 1 - SEEDS))
    closer = torch.zeros_like(reads)
    for _ in range(ROUNDS):
        if not bool(inside.any()) or not bool(outside.any()):
            break
        centres = torch.stack([F.normalize(keys[one].mean(0), dim=0) for one in (inside, outside)])
        towards = keys @ centres.T
        closer = towards[:, 0] - towards[:, 1]
        inside, outside = closer > 0, closer <= 0
    return closer.unflatten(0, grid)
