"""A learned word: a few vectors for each text encoder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .model import LearningError

NORM_LIMIT = 2.0
"""How much longer than the words it began as a vector may grow. Vocabulary embeddings have nearly one length; vectors
far longer drown the rest of the prompt."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def require_name(name: str) -> str:
    """The name itself, if it can stand as ``<name>`` in a prompt and as a file's name.

    Raises:
        LearningError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise LearningError(
            f"the token name {name!r} cannot be used in prompts: take letters, digits, '-' and '_' only, "
            "such as my-chair, without the brackets"
        )
    return name


def name_of(text: str, known: Callable[[str], bool]) -> str:
    """The name that a user wrote with its brackets or without.

    In brackets any name will do, as `<chair>` is no word of any prompt. Without them a word that the text encoder knows
    is refused: whoever writes it so will write it so in prompts, too, and there it means what it always did.

    Args:
        text: such as "<chair>" or "my-chair".
        known: whether a word is one token of a text encoder's vocabulary.

    Raises:
        LearningError: it is such a word, or cannot be a name at all.
    """
    bare = text.strip()
    if bare.startswith("<") and bare.endswith(">"):
        return require_name(bare[1:-1])
    name = require_name(bare)
    if known(name):
        raise LearningError(
            f"the token {name!r} is a word that the text encoder knows: write <{name}>, here and in prompts, "
            f"or take another name, such as my-{name}"
        )
    return name


class Token(nn.Module):
    """Vectors to learn, begun as the embeddings of words.

    Args:
        name: what stands between ``<`` and ``>`` in prompts.
        words: encoder -> (k, C) embeddings of the words it begins as.
        count: n, the vectors to learn for each encoder. The words are repeated or cut to n.
    """

    def __init__(self, name: str, words: Mapping[str, Tensor], count: int) -> None:
        super().__init__()
        self.name = require_name(name)
        if count < 1:
            raise LearningError(f"a token of {count} vectors was asked for, but it needs at least 1")
        empty = [encoder for encoder, found in words.items() if found.shape[0] == 0]
        if empty or not words:
            raise LearningError(
                f"the class word gives no token for {', '.join(empty) or 'any encoder'}: name a word, such as 'chair'"
            )
        self._vectors = nn.ParameterDict()
        self._limits: dict[str, float] = {}
        self._initial: dict[str, Tensor] = {}
        for encoder, found in sorted(words.items()):
            start = found.detach().float()[torch.arange(count, device=found.device) % found.shape[0]].clone()
            self._initial[encoder] = start.clone()
            self._limits[encoder] = NORM_LIMIT * float(start.norm(dim=1).mean())
            self._vectors[encoder] = nn.Parameter(start)

    @property
    def vectors(self) -> dict[str, Tensor]:
        """Encoder -> (n, C), as they are now."""
        return dict(self._vectors.items())

    @property
    def initial(self) -> dict[str, Tensor]:
        """Encoder -> (n, C), as they began."""
        return dict(self._initial)

    @torch.no_grad()
    def keep_sane(self) -> None:
        """Shorten vectors that grew beyond `NORM_LIMIT` times the mean length of the words they began as."""
        for encoder, vectors in self._vectors.items():
            vectors.renorm_(2, 0, self._limits[encoder])
