"""What an appearance's objectives take from a feature extractor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..features import FeatureExtractor as Extractor
from ..features import Features
from ..learning.guides import Guides, Look
from ..learning.model import LearningError
from ..learning.plan import Plan
from ..learning.recipes import NEED_FEATURES
from .comfy_learning import ComfyLearningModel, decoder


def needs_features(plan: Plan) -> bool:
    """Whether one of the plan's stages learns by what an extractor sees."""
    return any(name in NEED_FEATURES for stage in plan.stages for name in stage.objectives)


@contextmanager
def guides_of(
    extractor: Extractor | None, plan: Plan, opened: ComfyLearningModel, vae: Any, pictures: Tensor, masks: Tensor
) -> Iterator[Guides]:
    """What the plan's objectives need, while inside; nothing is loaded for a plan that needs none.

    Raises:
        LearningError: the backbone has no CLS token.
    """
    if extractor is None or not needs_features(plan):
        yield Guides()
        return

    def see(images: Tensor) -> Tensor:
        return _cls(extractor(images, grad=images.requires_grad), "cls_normed")

    with torch.no_grad():
        raw = _cls(extractor(pictures.permute(0, 3, 1, 2)), "cls").float().mean(0)
    widths = {name: value.shape[1] for name, value in opened.words(plan.class_word).items()}
    # Where no encoder has the backbone's width, `Guides.require` says so.
    fitting = [name for name, width in widths.items() if width == len(raw)] or list(widths)[:1]
    with decoder(opened, vae) as decode:
        yield Guides(Look.of(decode, see, pictures, masks), dict.fromkeys(fitting, raw.clone()))


def _cls(features: Features, name: str) -> Tensor:
    found = getattr(features, name)
    if found is None:
        raise LearningError("this backbone has no CLS token, which the objective needs: load one of DINO's")
    return found
