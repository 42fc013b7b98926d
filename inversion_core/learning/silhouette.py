"""The mask embedding of the founding plan: the vectors that explain an object's silhouettes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .lesson import InversionLesson
from .material import Encode, Material, digest_of
from .model import LearningModel
from .plan import Plan
from .trainer import Stage, train

RATE = 1e-2
PROMPT = "a <{name}>"


def mask_embedding(
    model: LearningModel, encode: Encode, masks: Tensor, plan: Plan, steps: int = 100, *, batch: int = 4
) -> Mapping[str, Tensor]:
    """Encoder -> vectors (n, C) that make the model draw these silhouettes, white on black: for `Guides.token`.

    The token alone learns, from the plan's class word and with the plan's count of vectors; the model stays as it is.

    Args:
        masks: (B, H, W) in [0, 1], in the size of the pictures.
        steps: of the optimiser, `batch` rows each.
    """
    stage = Stage("silhouette", steps, {"token": RATE}, {"diffusion": 1.0}, batch)
    lesson = InversionLesson(model, _silhouettes(encode, masks, plan.name), replace(plan, stages=(stage,)))
    train(lesson, (stage,), micro_batch=batch)
    return {name: value.detach().clone() for name, value in lesson.token.vectors.items()}


@torch.no_grad()
def _silhouettes(encode: Encode, masks: Tensor, name: str) -> Material:
    pictures = masks[..., None].float().expand(-1, -1, -1, 3)
    latents = torch.cat([encode(picture[None]).detach().to("cpu", torch.float32).clone() for picture in pictures])
    whole = torch.ones(len(latents), 1, *latents.shape[-2:])
    small = F.interpolate(masks[:1, None].float(), size=(64, 64), mode="area")[0, 0]
    preview = (small * 255).to(torch.uint8)[..., None].expand(-1, -1, 3).contiguous()
    prompts = ((PROMPT.format(name=name),),) * len(latents)
    return Material(latents, whole, prompts, latents, whole, preview, digest_of(pictures, masks))
