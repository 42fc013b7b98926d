"""What to learn and how, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .inversion import Kind
from .model import LearningError
from .offset import Sites
from .token import require_name
from .trainer import Stage

Framing = Literal["centred", "as pictured"]
"""Where the variants of a shape have it: in the middle at one size, or where and as large as the picture has it."""

OBJECTIVES = {
    "diffusion": "the diffusion loss as the model was trained, mostly inside the mask",
    "min_snr": "the same, weighted by min-SNR: less high noise, less detail",
    "attention_on_mask": "the picture reads the token inside the mask and nowhere else (Break-A-Scene)",
    "attention_distillation": "self-attention gives what it would give over the reference (Attention Distillation)",
    "moments": "mean and deviation of the predicted latent inside the mask are the reference's",
    "features": "a backbone sees in the decoded clean estimate what it sees in the pictures, most where noise is low",
    "projected": "a head fitted on other tokens takes the token to the pictures' whitened CLS",
    "token_mse": "the token is a given vector: the pictures' CLS as the founding plan had it, or a mask embedding",
}
"""Names a stage may weigh, and what they ask for."""


@dataclass(frozen=True)
class Plan:
    """What to learn and how. Everything here enters the hash of a training.

    Attributes:
        kind: of the inversion.
        name: of the token, without brackets.
        class_word: the words it begins as, such as "chair"; several words begin several vectors.
        stages: see `recipes`.
        vectors: learned vectors for each text encoder.
        rank: of the offset.
        variants: augmented pictures that are made, encoded and kept.
        seed: of everything random.
        beside: words that stand for what the pictures also show and another, frozen, inversion explains, such as
            ``<chair>``; half of an appearance's variants then keep their geometry, and their prompts name it.
        sites: where the offset goes; None: `offset.SHAPE_SITES` or `offset.APPEARANCE_SITES`.
        framing: of a shape's variants. An appearance's have no place to keep.
    """

    kind: Kind
    name: str
    class_word: str
    stages: tuple[Stage, ...]
    vectors: int = 1
    rank: int = 8
    variants: int = 64
    seed: int = 0
    beside: str = ""
    sites: Sites | None = None
    framing: Framing = "centred"

    def __post_init__(self) -> None:
        require_name(self.name)
        if self.variants < 1 or not self.stages:
            raise LearningError(
                f"the plan has {len(self.stages)} stages on {self.variants} variants, but needs at least one of each"
            )
        if self.framing not in get_args(Framing):
            raise LearningError(f"unknown framing {self.framing!r}: known are {', '.join(get_args(Framing))}")
        for stage in self.stages:
            if not stage.objectives or not stage.objectives.keys() <= OBJECTIVES.keys():
                raise LearningError(
                    f"stage {stage.name!r} has the objectives {', '.join(stage.objectives) or 'none'}; "
                    f"known are {', '.join(OBJECTIVES)}"
                )
