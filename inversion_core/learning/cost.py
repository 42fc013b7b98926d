"""What a training will cost, measured on one row before it begins."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from .guides import Guides
from .lesson import InversionLesson
from .material import Material
from .model import LearningModel
from .plan import Plan
from .trainer import is_out_of_memory

SPARE = 0.8
"""Share of the free memory that rows may take."""


@dataclass(frozen=True)
class Cost:
    """About so many seconds for the whole training, and bytes a row needs beside the model; None: unknown."""

    seconds: float
    row_bytes: int | None
    steps: int
    batch: int

    def rows(self, free: int) -> int:
        """How many rows at once fit into so many free bytes; all of a batch where a row's need is unknown.

        Running out of memory would tell, too, but some drivers (Windows) then go on many times slower instead.
        """
        if self.row_bytes is None:
            return self.batch
        return max(1, min(self.batch, int(SPARE * free / max(1, self.row_bytes))))

    def text(self) -> str:
        """For people."""
        minutes, seconds = divmod(round(self.seconds), 60)
        memory = "" if self.row_bytes is None else f"; {self.row_bytes / 2**20:.0f} MiB for each of them at once"
        return f"{self.steps} steps of {self.batch} pictures: about {minutes}:{seconds:02d} minutes{memory}"


def foreseen(model: LearningModel, material: Material, plan: Plan, guides: Guides | None = None) -> Cost:
    """Time one row of every stage, forwards and backwards; nothing is learned.

    Several rows at once take less time than one after another on a GPU, so this is an upper bound; so it is where a
    stage ends early.

    Raises:
        RuntimeError: memory does not suffice for one row even with checkpointing, as PyTorch says it.
    """
    lesson, before = InversionLesson(model, material, plan, guides), model.checkpointing
    try:
        return _measured(lesson, model.device)
    except RuntimeError as error:
        if not is_out_of_memory(error) or not lesson.save_memory():
            raise
        return _measured(lesson, model.device)
    finally:
        model.checkpointing = before


def _measured(lesson: InversionLesson, device: torch.device) -> Cost:
    stages, cuda = lesson.plan.stages, device.type == "cuda"
    total, most = 0.0, 0
    for stage in stages:
        before = 0
        if cuda:
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        for timed in (False, True):
            begun = time.perf_counter()
            torch.stack([one.sum() for one in lesson.losses(stage, 0, [0]).values()]).sum().backward()
            if cuda:
                torch.cuda.synchronize(device)
            if timed:
                total += (time.perf_counter() - begun) * stage.steps * stage.batch
        if cuda:
            most = max(most, torch.cuda.max_memory_allocated(device) - before)
    steps = sum(stage.steps for stage in stages)
    return Cost(total, most if cuda else None, steps, max(stage.batch for stage in stages))
