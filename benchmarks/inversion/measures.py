"""What pictures of a learned concept are measured by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from demo import world
from demo.judge import Judge
from inversion_core.metrics import appearance_distance

from .concepts import Wanted

UNRELATED = 4
"""Other appearances that "unrelated" is a mean over, for each prompt."""


def shape_figures(pictures: Tensor, wanted: Sequence[Wanted], judge: Judge) -> dict[str, float]:
    """`shape_present`: share of pictures with the learned shape; `prompt_obeyed`: with the prompted colour and texture.

    Args:
        pictures: (B, H, W, 3) in [0, 1], one for each prompt.
    """
    verdict = judge.look(pictures)
    truths = [one.truth for one in wanted]
    right = {
        name: np.array([found == world.value(f, name) for found, f in zip(getattr(verdict, name), truths, strict=True)])
        for name in ("shape", "colour", "texture", "background")
    }
    return {
        "shape_present": float(right["shape"].mean()),
        "prompt_obeyed": float((right["colour"] & right["texture"]).mean()),
        "colour": float(right["colour"].mean()),
        "texture": float(right["texture"].mean()),
        "background": float(right["background"].mean()),
    }


def appearance_figures(pictures: Tensor, wanted: Sequence[Wanted], judge: Judge) -> dict[str, float]:
    """`appearance` (1: as far from the truth as another true picture of it is; 0: as far as unrelated appearances are;
    a picture without an object counts 0), and how often the judge finds shape (`shape_obeyed`), colour and texture."""
    found = shape_figures(pictures, wanted, judge)
    masks = judge.look(pictures).mask
    scale = _Scale(wanted)
    scores = []
    for picture, mask, one in zip(pictures, masks, wanted, strict=True):
        if not bool((mask > 0.5).any()):
            scores.append(0.0)
            continue
        truth = world.render(one.truth)
        scores.append(
            scale(
                appearance_distance(
                    picture.permute(2, 0, 1),
                    torch.from_numpy(truth.image).permute(2, 0, 1),
                    mask,
                    torch.from_numpy(truth.mask),
                )
            )
        )
    return {
        "appearance": float(np.mean(scores)),
        "shape_obeyed": found["shape_present"],
        "colour": found["colour"],
        "texture": found["texture"],
        "background": found["background"],
    }


class _Scale:
    """Distances as scores. Both ends are means over the prompts: one picture's is too noisy to divide by."""

    def __init__(self, wanted: Sequence[Wanted]) -> None:
        same, unrelated = [], []
        for number, one in enumerate(wanted):
            own = one.truth.appearance
            rng = np.random.default_rng([one.seed, 11])
            turned = replace(own, angle=float(rng.uniform(0, np.pi)), phase=float(rng.uniform()))
            pose = wanted[number - 1].truth.pose
            same.append(_distance(one.truth, replace(one.truth, appearance=turned, pose=pose)))
            others = []
            while len(others) < UNRELATED:
                other = world.sample(int(rng.integers(30_000_000, 40_000_000))).appearance
                if other.colour != own.colour and other.texture != own.texture:
                    others.append(_distance(one.truth, replace(one.truth, appearance=other, pose=pose)))
            unrelated.append(float(np.mean(others)))
        self._same, self._unrelated = float(np.mean(same)), float(np.mean(unrelated))

    def __call__(self, distance: float) -> float:
        return (self._unrelated - distance) / (self._unrelated - self._same)


def _distance(a: world.Factors, b: world.Factors) -> float:
    (image_a, mask_a), (image_b, mask_b) = (map(torch.from_numpy, world.render(one)) for one in (a, b))
    return appearance_distance(image_a.permute(2, 0, 1), image_b.permute(2, 0, 1), mask_a, mask_b)
