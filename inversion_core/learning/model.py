"""What learning needs of a model: the one protocol between the core and its hosts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Prediction = Literal["eps", "v", "flow"]
"""What the model's output means: the noise, the velocity of DDPM's v-prediction, or flow matching's velocity."""


PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""Of an attention, in the words of ComfyUI and diffusers alike."""
FEED_FORWARD = ("net.0.proj", "net.2")
"""The linear layers behind a block's attentions, in the same words."""


class LearningError(RuntimeError):
    """Learning cannot begin or go on; the message says why and what to do."""


class Schedule(NamedTuple):
    """Noise levels (B,): a noisy latent is ``alpha * clean + sigma * noise``."""

    alpha: Tensor
    sigma: Tensor


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention of the model.

    Attributes:
        kind: "self" reads the picture's own tokens, "cross" the prompt's.
        part: where in the model it sits.
        heads: number of heads.
        projections: `PROJECTIONS` -> the linear layers, which are called and never read.
    """

    kind: Literal["self", "cross"]
    part: Literal["encoder", "middle", "decoder"]
    heads: int
    projections: Mapping[str, nn.Module]


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Encoded prompts.

    Attributes:
        context: (B, L, C) what cross-attention reads.
        pooled: (B, D) the prompts' pooled vectors, for models that want them.
        places: token name -> bool (B, L), true where one of the token's vectors stood in the prompt.
    """

    context: Tensor
    pooled: Tensor | None
    places: Mapping[str, Tensor]


class LearningModel(Protocol):
    """A frozen model that can be learned for. Its methods are called with autograd on, and gradients flow through
    `encode` and `predict` to the vectors and to whatever is hooked onto the projections."""

    family: str
    """Name of the model family: an inversion fits no other."""
    prediction: Prediction
    checkpointing: Callable[[], AbstractContextManager[None]] | None
    """Unless None, a pass keeps only the blocks' inputs and computes the rest again for the gradients, within what this
    returns (whoever hooks layers must hook them then, too): less memory, more work, the same results. None at first."""

    @property
    def device(self) -> torch.device:
        """Where latents go in and predictions come out."""
        ...

    def attentions(self) -> Mapping[str, Attention]:
        """Name -> attention. ``<name>.to_k`` is a projection's name in files, in ComfyUI's words."""
        ...

    def feed_forwards(self) -> Mapping[str, nn.Module]:
        """Name in files -> linear layer, such as ``<block>.ff.net.2``, of what follows the attentions of a block."""
        ...

    def words(self, text: str) -> dict[str, Tensor]:
        """Embeddings of the text's own tokens: encoder -> (k, C), float32."""
        ...

    def encode(self, prompts: Sequence[str], learned: Mapping[str, Mapping[str, Tensor]]) -> Conditioning:
        """Encode prompts in which ``<name>`` stands for the learned vectors (encoder -> (n, C)) of that name."""
        ...

    def schedule(self, level: Tensor) -> Schedule:
        """Noise levels (B,) in [0, 1), uniform over the timesteps the model was trained on, 0 almost clean."""
        ...

    def predict(self, noisy: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        """The model's output for noisy latents (B, C, h, w): what `prediction` says, float32."""
        ...
