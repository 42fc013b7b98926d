"""Scoring a composition against the demo world's true answer."""

from __future__ import annotations

import numpy as np
import torch

from inversion_core.metrics import appearance_score, mask_iou

from . import world
from .judge import Judge


def score_composition(
    result: np.ndarray,
    shape_of: world.Factors,
    appearance_of: world.Factors,
    background_of: world.Factors,
    judge: Judge | None = None,
) -> dict[str, float]:
    """Score a picture (H, W, 3) in [0, 1] that should show the shape of A with the appearance of B over C.

    Returns:
        `shape_iou`: overlap of the object the judge finds with the true one, 0 to 1.
        `appearance`: 1 = the true composition's own appearance inside the true mask, 0 = A's.
    """
    judge = judge or Judge.load()
    picture = torch.from_numpy(np.ascontiguousarray(result, dtype=np.float32))
    size = world.SIZE
    if picture.shape[:2] != (size, size):
        raise ValueError(f"the picture is {tuple(picture.shape)}, but the demo world is judged at {size}x{size}x3")
    truth = world.render(world.compose(shape_of, appearance_of, background_of))
    source = world.render(shape_of)
    found = judge.look(picture[None]).mask[0]
    mask = torch.from_numpy(truth.mask)
    made, true, own = (torch.as_tensor(image).permute(2, 0, 1) for image in (picture, truth.image, source.image))
    return {"shape_iou": mask_iou(found, mask), "appearance": appearance_score(made, true, own, mask)}
