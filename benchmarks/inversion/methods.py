"""Ours, its ablations, and what others do with one picture, all on the pack's own loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from demo import world
from demo.model import DemoModel, load_demo_model
from demo.vit import BACKBONE
from demo.weights import FOLDER
from inversion_core.features import Backbone, TimmExtractor, load
from inversion_core.hosts.comfy_guides import guides_of, needs_features
from inversion_core.hosts.comfy_inversion import apply_inversion
from inversion_core.hosts.comfy_learning import learning_model
from inversion_core.learning.inversion import Inversion, Kind
from inversion_core.learning.learn import learn
from inversion_core.learning.lesson import InversionLesson
from inversion_core.learning.material import Material, prepare
from inversion_core.learning.model import PROJECTIONS, LearningModel
from inversion_core.learning.offset import Sites
from inversion_core.learning.plan import Framing, Plan
from inversion_core.learning.recipes import APPEARANCE_OBJECTIVES, OFFSET_RATE, TOKEN_RATE, plan_of
from inversion_core.learning.trainer import Stage, train

from .concepts import TOKENS, Concept

CLASS_WORD: dict[Kind, str] = {"shape": "shape", "appearance": "textured"}
RARE_WORD = "sks"
"""DreamBooth's: a string of letters that means nothing to the model."""
BESIDE = 0.5
"""Strength of an appearance's offset beside a shape's: at 1 the two get in each other's way (docs/inversion.md)."""
FULL_RATE = 1e-4
DREAMBOOTH_RATE = 4e-3
"""Neither was tuned."""
TEMPLATES: dict[Kind, tuple[str, ...]] = {"shape": ("a {token}",), "appearance": ("a {token} shape",)}
"""Prompts of methods that see the picture itself and are told nothing about it."""


@dataclass(frozen=True)
class Learned:
    """What a method made: the model to sample with, the inversion if it is one, and what it cost."""

    demo: DemoModel
    inversion: Inversion | None
    steps: int


@dataclass(frozen=True)
class Method:
    """A way to learn from one picture.

    Attributes:
        plan: kind and steps -> what is learned and how.
        augmented: whether it sees the plan's variants, or only the picture itself, all of it, with `TEMPLATES`.
        whole: all weights of the denoiser are learned besides the token; the plan's offset is not.
        kinds: what it is a method for.
    """

    plan: Callable[[Kind, int], Plan]
    augmented: bool = True
    whole: bool = False
    kinds: tuple[Kind, ...] = ("shape", "appearance")


def ours(kind: Kind, steps: int) -> Plan:
    """What the nodes do by default."""
    return _planned(kind, steps)


def _planned(kind: Kind, steps: int, sites: str = "default", framing: Framing = "centred") -> Plan:
    return plan_of(kind, TOKENS[kind], CLASS_WORD[kind], steps, sites=sites, framing=framing)


def _objectives(wanted: Mapping[str, float]) -> Callable[[Kind, int], Plan]:
    """Ours with other objectives."""

    def plan(kind: Kind, steps: int) -> Plan:
        found = ours(kind, steps)
        return replace(found, stages=tuple(replace(stage, objectives=wanted) for stage in found.stages))

    return plan


def _sites(name: str) -> Callable[[Kind, int], Plan]:
    return partial(_planned, sites=name)


def _only(group: str) -> Callable[[Kind, int], Plan]:
    """Ours with the token or the offset alone."""

    def plan(kind: Kind, steps: int) -> Plan:
        found = ours(kind, steps)
        rates = {group: TOKEN_RATE if group == "token" else OFFSET_RATE[kind]}
        return replace(found, stages=(replace(found.stages[-1], name=group, steps=steps, rates=rates),))

    return plan


def _textual_inversion(kind: Kind, steps: int) -> Plan:
    """Gal et al., arXiv 2208.01618: the token, by the plain diffusion loss."""
    found = ours(kind, steps)
    stage = Stage("token", steps, {"token": TOKEN_RATE}, {"diffusion": 1.0}, found.stages[0].batch)
    return replace(found, stages=(stage,))


def _dreambooth_lora(kind: Kind, steps: int) -> Plan:
    """Ruiz et al., arXiv 2208.12242, with a LoRA: a rare word that stays as it is, all attention learns."""
    found = ours(kind, steps)
    stage = Stage("offset", steps, {"offset": DREAMBOOTH_RATE}, {"diffusion": 1.0}, found.stages[0].batch)
    return replace(found, class_word=RARE_WORD, stages=(stage,), sites=Sites(("self", "cross"), PROJECTIONS))


def _whole(kind: Kind, steps: int) -> Plan:
    found = ours(kind, steps)
    rates = {"token": TOKEN_RATE / 2, "whole": FULL_RATE}
    return replace(found, stages=(replace(found.stages[-1], name="whole", steps=steps, rates=rates),))


METHODS: dict[str, Method] = {
    "ours": Method(ours),
    "textual inversion": Method(_textual_inversion, augmented=False),
    "dreambooth lora": Method(_dreambooth_lora, augmented=False),
    "full fine-tune": Method(_whole, whole=True),
    "ours: as pictured": Method(partial(_planned, framing="as pictured"), kinds=("shape",)),
    "ours: token alone": Method(_only("token")),
    "ours: offset alone": Method(_only("offset")),
    "ours: picture not varied": Method(ours, augmented=False),
    "ours: offset on keys and values of cross-attention": Method(_sites("cross-attention"), kinds=("shape",)),
    "ours: offset on all attention": Method(_sites("all attention"), kinds=("shape",)),
    "ours: offset everywhere": Method(_sites("everything"), kinds=("appearance",)),
    "ours: diffusion loss alone": Method(_objectives({"diffusion": 1.0})),
    "ours: min-SNR alone": Method(_objectives({"min_snr": 1.0})),
    "ours: attention on mask alone": Method(_objectives({"attention_on_mask": 1.0}), kinds=("shape",)),
    "ours: attention distillation alone": Method(_objectives({"attention_distillation": 1.0}), kinds=("appearance",)),
    "ours: moments alone": Method(_objectives({"moments": 1.0}), kinds=("appearance",)),
    "ours: features alone": Method(_objectives({"features": 1.0}), kinds=("appearance",)),
    **{
        f"ours: diffusion loss and {name}": Method(_objectives(APPEARANCE_OBJECTIVES[name]), kinds=("appearance",))
        for name in ("moments", "features", "token_mse")
    },
}


def learned(method: Method, concept: Concept, steps: int, demo: DemoModel) -> Learned:
    """Learn the concept from its one picture; the demo model that is handed in stays as it is."""
    plan = method.plan(concept.kind, steps)
    if method.whole:
        demo = load_demo_model()
    picture, mask = _pictured(concept)
    material = _material(method, plan, picture, mask, demo)
    batch = plan.stages[0].batch
    with (
        learning_model(demo.model, demo.clip, [batch, *material.latents.shape[1:]]) as opened,
        guides_of(_extractor(plan), plan, opened, demo.vae, picture, mask) as guides,
    ):
        if method.whole:
            lesson = _WholeLesson(opened, material, plan, demo.model.model.diffusion_model)
            history = train(lesson, plan.stages, micro_batch=batch)
            # In place of an offset the model itself has changed.
            inversion = replace(lesson.inversion({}), offset={})
        else:
            inversion, history = learn(opened, material, plan, guides=guides, micro_batch=batch)
    done = len(next(iter(history.losses.values())))
    return Learned(applied(demo, [inversion]), None if method.whole else inversion, done)


def applied(demo: DemoModel, inversions: Sequence[Inversion]) -> DemoModel:
    """The demo model with these inversions; an appearance's offset beside others by `BESIDE`."""
    model, clip = demo.model, demo.clip
    for one in inversions:
        beside = one.kind == "appearance" and len(inversions) > 1
        model, clip = apply_inversion(model, clip, one, offset_strength=BESIDE if beside else 1.0)
    return DemoModel(model, clip, demo.vae)


def _material(method: Method, plan: Plan, picture: Tensor, mask: Tensor, demo: DemoModel) -> Material:
    def encode(pictures: Tensor) -> Tensor:
        return demo.model.model.process_latent_in(demo.vae.encode(pictures))

    if method.augmented:
        return prepare(encode, picture, mask, plan)
    found = prepare(encode, picture, mask, replace(plan, variants=1))
    prompts = tuple(template.format(token=f"<{plan.name}>") for template in TEMPLATES[plan.kind])
    return replace(found, latents=found.reference, masks=torch.ones_like(found.reference_masks), prompts=(prompts,))


def _pictured(concept: Concept) -> tuple[Tensor, Tensor]:
    """The concept's picture (1, H, W, 3) and its mask (1, H, W)."""
    rendered = world.render(concept.factors)
    return torch.from_numpy(rendered.image)[None], torch.from_numpy(rendered.mask)[None]


def _extractor(plan: Plan) -> TimmExtractor | None:
    """The demo's own ViT, for a plan that learns by what it sees."""
    backbone = Backbone(**BACKBONE)
    return TimmExtractor(load(backbone, FOLDER / backbone.file), backbone) if needs_features(plan) else None


class _WholeLesson(InversionLesson):
    """The token and every weight of the denoiser."""

    def __init__(self, model: LearningModel, material: Material, plan: Plan, denoiser: nn.Module) -> None:
        super().__init__(model, material, plan)
        self._denoiser = denoiser

    @property
    def groups(self) -> Mapping[str, nn.Module]:
        """What is learned."""
        return {**super().groups, "whole": self._denoiser}


def chosen(names: Sequence[str]) -> dict[str, Method]:
    """Methods by name.

    Raises:
        SystemExit: there is no such method.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise SystemExit(f"--methods: there is no {', '.join(unknown)}; there are {', '.join(METHODS)}")
    return {name: METHODS[name] for name in names}
