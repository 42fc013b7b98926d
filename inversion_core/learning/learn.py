"""Learning from beginning to end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from .guides import Guides
from .inversion import Inversion
from .lesson import InversionLesson
from .material import Material
from .model import LearningModel
from .plan import Plan
from .trainer import History, Progress, train


def learn(
    model: LearningModel,
    material: Material,
    plan: Plan,
    *,
    guides: Guides | None = None,
    micro_batch: int = 4,
    checkpoint: Path | None = None,
    job: str = "",
    progress: Callable[[Progress, InversionLesson], None] | None = None,
    keep: Callable[[Inversion], None] | None = None,
) -> tuple[Inversion, History]:
    """Learn a shape or an appearance; the model is not changed.

    Args:
        material: what `prepare` made of the pictures for this plan.
        guides: what some objectives need; no part of the hash of a training unless the caller puts it there.
        progress: told after each step, with the lesson as it stands; what it raises ends the learning.
        keep: writes the result; the checkpoint stays until it has.
        micro_batch, checkpoint, job: see `trainer.train`.

    Raises:
        LearningError: see `trainer.train`.
    """
    lesson, found = InversionLesson(model, material, plan, guides), []

    def finish(history: History) -> None:
        settings = json.loads(json.dumps({**asdict(plan), "evaluations": history.evaluations}))
        found.append(lesson.inversion(settings))
        if keep is not None:
            keep(found[0])

    history = train(
        lesson,
        plan.stages,
        micro_batch=micro_batch,
        checkpoint=checkpoint,
        job=job,
        progress=None if progress is None else lambda news: progress(news, lesson),
        keep=finish,
    )
    return found[0], history


def job_of(model: str, pictures: str, plan: Plan) -> str:
    """A hash of all that a training depends on: the model's fingerprint, the pictures' digest and the plan."""
    return hashlib.sha256(f"{model}\n{pictures}\n{asdict(plan)!r}".encode()).hexdigest()
