"""The founding plan's third idea: shape first, frozen, then appearance, against both at once. All from one picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from demo import world
from demo.model import DemoModel
from inversion_core.hosts.comfy_learning import learning_model
from inversion_core.learning.inversion import Inversion
from inversion_core.learning.learn import learn
from inversion_core.learning.lesson import InversionLesson
from inversion_core.learning.material import prepare
from inversion_core.learning.model import Conditioning, LearningModel
from inversion_core.learning.plan import Plan
from inversion_core.learning.trainer import Stage, train

from .concepts import TOKENS, Newcomer
from .methods import applied, ours

WAYS = ("sequential", "joint", "apart")
"""Shape first, then appearance beside it; both in one loop; each alone, knowing nothing of the other."""


def learned_both(way: str, newcomer: Newcomer, steps: int, demo: DemoModel) -> DemoModel:
    """The demo model with both inversions applied, the appearance's offset by `BESIDE`, learned from the newcomer's one
    picture in one of `WAYS`."""
    rendered = world.render(newcomer.factors)
    picture, mask = torch.from_numpy(rendered.image)[None], torch.from_numpy(rendered.mask)[None]
    shape, look = ours("shape", steps), ours("appearance", steps)
    if way != "apart":
        look = replace(look, beside=f"<{TOKENS['shape']}>")
    if way == "joint":
        found = _joint(demo, picture, mask, shape, look)
    else:
        first = _alone(demo, picture, mask, shape)
        found = [first, _alone(applied(demo, [first] if way == "sequential" else []), picture, mask, look)]
    return applied(demo, found)


def _encode(demo: DemoModel) -> Callable[[Tensor], Tensor]:
    return lambda pictures: demo.model.model.process_latent_in(demo.vae.encode(pictures))


def _alone(demo: DemoModel, picture: Tensor, mask: Tensor, plan: Plan) -> Inversion:
    material = prepare(_encode(demo), picture, mask, plan)
    batch = max(stage.batch for stage in plan.stages)
    with learning_model(demo.model, demo.clip, [batch, *material.latents.shape[1:]]) as opened:
        return learn(opened, material, plan, micro_batch=batch)[0]


def _joint(demo: DemoModel, picture: Tensor, mask: Tensor, shape: Plan, look: Plan) -> list[Inversion]:
    materials = [prepare(_encode(demo), picture, mask, plan) for plan in (shape, look)]
    batch = shape.stages[-1].batch + look.stages[-1].batch
    with learning_model(demo.model, demo.clip, [batch, *materials[0].latents.shape[1:]]) as opened:
        models = [_Knowing(opened), _Knowing(opened)]
        lessons = [
            InversionLesson(cast(LearningModel, model), material, plan)
            for model, material, plan in zip(models, materials, (shape, look), strict=True)
        ]
        models[0].other, models[1].other = lessons[1], lessons[0]
        both = JointLesson(lessons[0], lessons[1])
        train(both, [both.stage()], micro_batch=batch)
        return [lesson.inversion({}) for lesson in lessons]


class _Knowing:
    """A model in whose prompts another lesson's token stands, too."""

    def __init__(self, model: LearningModel) -> None:
        self.model = model
        self.other: InversionLesson | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode(self, prompts: Sequence[str], learned: Mapping[str, Mapping[str, Tensor]]) -> Conditioning:
        """As the model does, with the other's vectors as they are now."""
        if self.other is not None:
            learned = {**learned, self.other.plan.name: self.other.token.vectors}
        return self.model.encode(prompts, learned)


class JointLesson:
    """A shape's and an appearance's lesson at once: half of a step's rows are the one's, half the other's, and each
    sees the model with the other's token and offset as they stand."""

    def __init__(self, shape: InversionLesson, look: InversionLesson) -> None:
        self._lessons = {"shape": shape, "look": look}

    def stage(self) -> Stage:
        """As many steps as the longer of the two, and the rows of both."""
        last = {name: lesson.plan.stages[-1] for name, lesson in self._lessons.items()}
        steps = max(sum(stage.steps for stage in lesson.plan.stages) for lesson in self._lessons.values())
        rates = {f"{name} {group}": rate for name, stage in last.items() for group, rate in stage.rates.items()}
        return Stage("joint", steps, rates, {}, sum(stage.batch for stage in last.values()))

    @property
    def groups(self) -> Mapping[str, nn.Module]:
        """What is learned."""
        return {
            f"{name} {group}": module
            for name, lesson in self._lessons.items()
            for group, module in lesson.groups.items()
        }

    @contextmanager
    def _beside(self, name: str) -> Iterator[InversionLesson]:
        other = self._lessons["look" if name == "shape" else "shape"]
        with other.applied():
            yield self._lessons[name]

    def losses(self, stage: Stage, step: int, rows: Sequence[int]) -> dict[str, Tensor]:
        """Even rows are the shape's, odd ones the appearance's."""
        found: dict[str, Tensor] = {}
        for first, name in enumerate(self._lessons):
            own = [row // 2 for row in rows if row % 2 == first]
            if own:
                with self._beside(name) as lesson:
                    losses = lesson.losses(lesson.plan.stages[-1], step, own)
                found |= {f"{name} {objective}": loss for objective, loss in losses.items()}
        return found

    def evaluate(self, stage: Stage) -> float:
        """The sum of both."""
        total = 0.0
        for name in self._lessons:
            with self._beside(name) as lesson:
                total += lesson.evaluate(lesson.plan.stages[-1])
        return total

    def after_step(self) -> None:
        """Keeps both tokens sane."""
        for lesson in self._lessons.values():
            lesson.after_step()

    def save_memory(self) -> bool:
        """The demo model never needs it."""
        return False
