"""One loop for everything that is learned: seeded, resumable bit for bit, stopped by its caller at any step.

A lesson's losses are a function of stage, step and row, so the state on disk is the step, what is learned, its moving
average and the optimiser: a killed run goes on as if it had never stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .files import read_tensors, write_tensors
from .model import LearningError

BETAS = (0.9, 0.99)
CLIP = 1.0
"""Largest norm of the gradient of one group."""
WARMUP = 0.05
"""Share of a stage over which the learning rate rises; then it falls to zero along a cosine."""
CHECKS = 20, 10
"""Evaluations in a stage at most, and steps between two of them at least."""
FLAT = 0.005, 5
"""A stage ends early when this many evaluations in a row were not this share better than the best before."""


@dataclass(frozen=True)
class Stage:
    """One part of a training, as data.

    Attributes:
        name: for people.
        steps: of the optimiser.
        rates: group ("token", "offset") -> highest learning rate. What is not named is frozen.
        objectives: name -> weight, for the lesson.
        batch: rows a step.
        average: decay of the moving average that is kept as the result.
        levels: lowest and highest noise level of what is learned from, in [0, 1]; see `LearningModel.schedule`.
    """

    name: str
    steps: int
    rates: Mapping[str, float]
    objectives: Mapping[str, float] = field(default_factory=dict)
    batch: int = 4
    average: float = 0.98
    levels: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise LearningError(
                f"stage {self.name!r} has {self.steps} steps of {self.batch} rows, but needs at least one of one"
            )
        if not 0 <= self.levels[0] < self.levels[1] <= 1:
            raise LearningError(
                f"stage {self.name!r} learns at noise levels {self.levels[0]} to {self.levels[1]}, but they must rise "
                "within 0 to 1"
            )
        if not any(rate > 0 for rate in self.rates.values()):
            raise LearningError(f"stage {self.name!r} learns nothing: give one of its groups a learning rate")


class Lesson(Protocol):
    """Something to learn. Nothing but the modules of `groups` may change between steps."""

    @property
    def groups(self) -> Mapping[str, nn.Module]:
        """Name -> what is learned."""
        ...

    def losses(self, stage: Stage, step: int, rows: Sequence[int]) -> Mapping[str, Tensor]:
        """Objective -> its weighted loss for each of these rows (len(rows),). A function of its arguments."""
        ...

    def evaluate(self, stage: Stage) -> float:
        """The loss on fixed pictures, noise and levels, without gradients."""
        ...

    def after_step(self) -> None:
        """Called after each step of the optimiser."""
        ...

    def save_memory(self) -> bool:
        """Memory ran out on a single row: do with less from now on. False: nothing can be saved any more."""
        ...


@dataclass(frozen=True)
class Progress:
    """Where a training stands, told after every step. `done` and `total` count the steps of all stages."""

    stage: str
    done: int
    total: int
    loss: float
    seconds_left: float
    evaluation: float | None


@dataclass
class History:
    """What happened. `losses`: objective -> one mean a step; `evaluations`: (steps done, loss)."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    micro_batch: int = 0
    stopped_early: list[str] = field(default_factory=list)

    def as_data(self) -> dict[str, Any]:
        """JSON-like, for the file."""
        return dict(vars(self))

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> History:
        """The inverse of `as_data`."""
        evaluations = [(int(step), float(loss)) for step, loss in data["evaluations"]]
        return cls(dict(data["losses"]), evaluations, int(data["micro_batch"]), list(data["stopped_early"]))


def train(
    lesson: Lesson,
    stages: Sequence[Stage],
    *,
    micro_batch: int,
    checkpoint: Path | None = None,
    job: str = "",
    save_every_s: float = 10.0,
    progress: Callable[[Progress], None] | None = None,
    keep: Callable[[History], None] | None = None,
) -> History:
    """Run the stages one after another; afterwards the lesson's modules hold the averaged weights of the last.

    Args:
        micro_batch: rows that go through the model at once; halved whenever memory runs out, down to one row, after
            which the lesson is asked to save memory.
        checkpoint: where the state is kept while learning; resumed from if it is there, removed at the end.
        job: what identifies pictures, settings and model: a checkpoint of another job is refused.
        save_every_s: seconds between two checkpoints.
        progress: told after each step. What it raises ends the training, after the state was saved; so does what a
            lesson's losses raise.
        keep: called at the end, when the lesson's modules hold the result, and before the checkpoint is removed: if it
            cannot be kept (no room on the disk), the training goes on from its last checkpoint another time.

    Raises:
        LearningError: the loss is no number, memory does not suffice for one row, or the checkpoint belongs elsewhere.
    """
    run = _Run(lesson, stages, min(micro_batch, max(stage.batch for stage in stages)), checkpoint, job)
    begun, first, saved = time.monotonic(), run.done, time.monotonic()
    for stage, step in run.steps():
        losses = run.learn(stage, step)
        evaluation = run.evaluate(stage, step)
        if progress is not None:
            each = (time.monotonic() - begun) / (run.done - first)
            news = Progress(stage.name, run.done, run.total, sum(losses.values()), each * run.left(), evaluation)
            with run.saved_on_failure():
                progress(news)
        if time.monotonic() - saved > save_every_s:
            run.save()
            saved = time.monotonic()
    if keep is not None:
        keep(run.history)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return run.history


class _Run:
    """The state of one training."""

    def __init__(
        self, lesson: Lesson, stages: Sequence[Stage], micro_batch: int, checkpoint: Path | None, job: str
    ) -> None:
        names = [stage.name for stage in stages]
        if len(set(names)) < max(1, len(names)):
            raise LearningError(
                f"stages need names of their own, at least one stage: {', '.join(names) or 'there is none'}"
            )
        self.lesson, self.stages, self.checkpoint, self.job = lesson, stages, checkpoint, job
        self.history = History(micro_batch=micro_batch)
        self.number, self.step, self.done = 0, 0, 0
        self.average = self._learned()
        self.optimiser = self._optimiser(stages[0])
        if checkpoint is not None and checkpoint.is_file():
            self._resume(checkpoint)

    @property
    def total(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def left(self) -> int:
        """Steps still to do, if no stage ends early."""
        return sum(stage.steps for stage in self.stages[self.number :]) - self.step

    def steps(self) -> Iterator[tuple[Stage, int]]:
        """Stages and steps from where the state stands; `learn` moves it on."""
        if self.done == 0:
            self.history.evaluations = [(0, self.lesson.evaluate(self.stages[0]))]
        while self.number < len(self.stages):
            stage = self.stages[self.number]
            while self.step < stage.steps and stage.name not in self.history.stopped_early:
                yield stage, self.step
            self._load(self.average)
            self.number, self.step = self.number + 1, 0
            if self.number < len(self.stages):
                self.average = self._learned()
                self.optimiser = self._optimiser(self.stages[self.number])

    def learn(self, stage: Stage, step: int) -> dict[str, float]:
        """One step of the optimiser; the mean of every objective."""
        for group in self.optimiser.param_groups:
            group["lr"] = stage.rates[group["name"]] * _rate(step, stage.steps)
        with self.saved_on_failure():
            losses = self._gradients(stage, step)
        total = sum(losses.values())
        if not math.isfinite(total):
            raise LearningError(
                f"the loss is {total} at step {self.done} ({', '.join(f'{k} {v:.3g}' for k, v in losses.items())}): "
                "lower the learning rate, or look for broken pixels in the pictures. Nothing was saved from this step"
            )
        for group in self.optimiser.param_groups:
            nn.utils.clip_grad_norm_(group["params"], CLIP)
        self.optimiser.step()
        self.lesson.after_step()
        self.step, self.done = step + 1, self.done + 1
        decay = min(stage.average, self.step / (self.step + 9))
        with torch.no_grad():
            for name, value in self._learned(copy=False).items():
                self.average[name].lerp_(value, 1 - decay)
        for name, value in losses.items():
            self.history.losses.setdefault(name, []).append(value)
        return losses

    def evaluate(self, stage: Stage, step: int) -> float | None:
        """The loss on fixed noise every so often; notes when the stage has become flat."""
        every = max(CHECKS[1], stage.steps // CHECKS[0])
        if (step + 1) % every and step + 1 != stage.steps:
            return None
        found = self.lesson.evaluate(stage)
        first = self.done - self.step
        self.history.evaluations.append((self.done, found))
        seen = [loss for done, loss in self.history.evaluations if done > first]
        if _flat(seen) and step + 1 < stage.steps:
            self.history.stopped_early.append(stage.name)
        return found

    def _gradients(self, stage: Stage, step: int) -> dict[str, float]:
        """Gradients of a whole batch, in as many parts as memory asks for."""
        while True:
            self.optimiser.zero_grad(set_to_none=True)
            micro = min(self.history.micro_batch, stage.batch)
            try:
                sums: dict[str, Tensor] = {}
                for first in range(0, stage.batch, micro):
                    parts = self.lesson.losses(stage, step, range(first, min(first + micro, stage.batch)))
                    (sum(part.sum() for part in parts.values()) / stage.batch).backward()  # pyright: ignore[reportAttributeAccessIssue]
                    for name, part in parts.items():
                        value = part.detach().sum() / stage.batch
                        sums[name] = sums[name] + value if name in sums else value
                return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if micro == 1 and not self.lesson.save_memory():
                    raise LearningError(
                        "memory ran out with one row at a time: take smaller pictures, or free memory"
                    ) from error
            # Outside the except clause, so that the failed pass's tensors are gone.
            self.history.micro_batch = max(1, micro // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _learned(self, *, copy: bool = True) -> dict[str, Tensor]:
        return {
            f"{group}.{name}": value.detach().clone() if copy else value.detach()
            for group, module in self.lesson.groups.items()
            for name, value in module.named_parameters()
        }

    def _optimiser(self, stage: Stage) -> torch.optim.Optimizer:
        groups = []
        for name, module in self.lesson.groups.items():
            learns = stage.rates.get(name, 0) > 0
            module.requires_grad_(learns)
            if learns:
                groups.append({"name": name, "params": list(module.parameters()), "lr": stage.rates[name]})
        unknown = stage.rates.keys() - self.lesson.groups.keys()
        if unknown:
            raise LearningError(
                f"stage {stage.name!r} has a learning rate for {', '.join(sorted(unknown))}, "
                f"but there is {', '.join(self.lesson.groups)}"
            )
        return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)

    @torch.no_grad()
    def _load(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._learned(copy=False).items():
            parameter.copy_(values[name])

    # --- on disk ------------------------------------------------------------------------------------------------------

    @contextmanager
    def saved_on_failure(self) -> Iterator[None]:
        """Saves the last whole step if the caller cancels: in its progress function, or in the midst of the model."""
        try:
            yield
        except BaseException:
            self.save()
            raise

    def save(self) -> None:
        """Write the state after the last whole step."""
        if self.checkpoint is None:
            return
        tensors = {f"learned.{name}": value for name, value in self._learned(copy=False).items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": value for name, value in state.items()}
        about = {"job": self.job, "number": self.number, "step": self.step, "done": self.done}
        about["history"] = self.history.as_data()
        write_tensors(self.checkpoint, tensors, {"state": json.dumps(about)})

    def _resume(self, path: Path) -> None:
        metadata, tensors = read_tensors(path)
        about = json.loads(metadata["state"])
        if about["job"] != self.job:
            raise LearningError(
                f"the checkpoint {path} belongs to other pictures, settings or another model: delete it to begin anew"
            )
        self.number, self.step, self.done = about["number"], about["step"], about["done"]
        self.history = History.from_data(about["history"])
        self._load({name.removeprefix("learned."): value for name, value in tensors.items()})
        for name, value in self.average.items():
            value.copy_(tensors[f"average.{name}"])
        self.optimiser = self._optimiser(self.stages[self.number])
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimiser."):
                _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = value
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the machine had no memory left."""
    text = str(error).lower()
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in text or "allocate memory" in text


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero: in (0, 1]."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


def _flat(seen: Sequence[float]) -> bool:
    """Whether the last few evaluations brought nothing over the best before them."""
    share, count = FLAT
    if len(seen) <= count:
        return False
    return min(seen[-count:]) > (1 - share) * min(seen[:-count])
