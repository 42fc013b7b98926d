"""One training loop for every stage: seeded, resumable, CPU or GPU.

A stage's batch is a pure function of the step number, so the state on disk is the step, the weights, their moving
average and the optimiser; a killed run goes on as if it had never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..files import replace_file

T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """What a stage needs of the loop. Learning rates follow one cycle: linear warm-up, then cosine to zero."""

    name: str
    steps: int
    learning_rate: float
    warmup: float = 0.05
    weight_decay: float = 0.01
    ema: float = 0.999
    clip: float = 1.0
    samples_every: int = 500


class Stage(Protocol):
    """A model and what it learns from. `samples` and `export` are called while the model holds averaged weights."""

    recipe: Recipe

    @property
    def model(self) -> nn.Module: ...

    def warm_start(self) -> None:
        """Begin with the committed weights instead of random ones; ValueError where that makes no sense."""
        ...

    def loss(self, step: int) -> Tensor:
        """The scalar loss on the batch of this step."""
        ...

    def samples(self, folder: Path, step: int) -> str:
        """Write pictures to look at; return one line of figures for the log."""
        ...

    def export(self) -> None:
        """Write the stage's weights as safetensors."""
        ...


def learning_rate(recipe: Recipe, step: int) -> float:
    """The one-cycle learning rate at a step."""
    warm = max(1, int(recipe.warmup * recipe.steps))
    if step < warm:
        return recipe.learning_rate * (step + 1) / warm
    progress = (step - warm) / max(1, recipe.steps - warm)
    return recipe.learning_rate * (0.5 + 0.5 * math.cos(math.pi * min(1.0, progress)))


def train(stage: Stage, runs: Path, *, save_every_s: float = 120.0) -> None:
    """Run the stage to its last step, resuming from `runs/<name>/state.pt` if it is there."""
    recipe, folder = stage.recipe, runs / stage.recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    state_file = folder / "state.pt"
    averaged = _Average(stage.model, recipe.ema)
    optimiser = torch.optim.AdamW(
        (p for p in stage.model.parameters() if p.requires_grad),
        lr=recipe.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=recipe.weight_decay,
    )
    start = _resume(state_file, stage.model, averaged, optimiser)
    saved, running = time.monotonic(), 0.0
    bar = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, desc=recipe.name, mininterval=10)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(recipe, step)
        optimiser.zero_grad(set_to_none=True)
        loss = stage.loss(step)
        loss.backward()
        nn.utils.clip_grad_norm_(stage.model.parameters(), recipe.clip)
        optimiser.step()
        averaged.update(step)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RuntimeError(f"{recipe.name}: loss is {value} at step {step}; the last good state is {state_file}")
        running = value if running == 0.0 else 0.98 * running + 0.02 * value
        last = step + 1 == recipe.steps
        if last or time.monotonic() - saved > save_every_s:
            _save(state_file, step + 1, stage.model, averaged, optimiser)
            saved = time.monotonic()
        if last or (step + 1) % recipe.samples_every == 0:
            figures = averaged.apply(partial(stage.samples, folder, step + 1))
            line = f"{recipe.name} step {step + 1} loss {running:.4f} {figures}"
            bar.write(line)
            with (folder / "curve.log").open("a", encoding="utf-8") as curve:
                curve.write(line + "\n")
            averaged.apply(stage.export)
    bar.close()


class _Average:
    """Exponential moving average of the weights; early steps average over what there is."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.shadow = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        for name, value in self.model.state_dict().items():
            if value.dtype.is_floating_point:
                self.shadow[name].lerp_(value, 1 - decay)
            else:
                self.shadow[name].copy_(value)

    def apply(self, use: Callable[[], T]) -> T:
        """Call `use` while the model holds the averaged weights; the trained ones come back afterwards."""
        kept = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        was_training = self.model.training
        self.model.load_state_dict(self.shadow)
        self.model.eval()
        try:
            with torch.no_grad():
                return use()
        finally:
            self.model.load_state_dict(kept)
            self.model.train(was_training)


def _save(file: Path, step: int, model: nn.Module, averaged: _Average, optimiser: torch.optim.Optimizer) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "average": averaged.shadow,
        "optimiser": optimiser.state_dict(),
    }
    replace_file(file, lambda path: torch.save(state, path))


def _resume(file: Path, model: nn.Module, averaged: _Average, optimiser: torch.optim.Optimizer) -> int:
    if not file.is_file():
        return 0
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state["model"])
    averaged.shadow = state["average"]
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"])
