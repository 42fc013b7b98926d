"""Learned inversions in ComfyUI: ``<name>`` in any prompt, and the offset as a stock weight patch.

Nothing of the shared CLIP or MODEL is changed: the clones carry a copy of the tokenizer that knows the tokens, and
patches as Load LoRA makes them.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.sd
import torch
from comfy.sd1_clip import SDTokenizer
from torch import Tensor

from ..learning.files import lora
from ..learning.inversion import Inversion
from .base import HostError

FAMILIES = {"SD15": "SD1.x", "SD20": "SD2.x", "SDXL": "SDXL"}
"""ComfyUI's model configs -> what people call them."""

Vectors = Mapping[str, Tensor]
"""Text encoder ("clip_l", "clip_g", ...) -> (n, C)."""


def family_of(model: comfy.model_patcher.ModelPatcher) -> str:
    """The model's family, as inversions name it: what its config calls itself (`family_name`, which ComfyUI's own have
    not), else what people call it, else the config's class."""
    config = model.model.model_config
    name = type(config).__name__
    return getattr(config, "family_name", None) or FAMILIES.get(name, name)


def apply_inversion(
    model: comfy.model_patcher.ModelPatcher,
    clip: comfy.sd.CLIP,
    inversion: Inversion,
    token_strength: float = 1.0,
    offset_strength: float = 1.0,
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP]:
    """Clones of model and CLIP that know the inversion.

    Args:
        token_strength: 0 makes ``<name>`` mean the words it began as, 1 what was learned.
        offset_strength: 0 leaves the model's weights as they are.

    Raises:
        LearningError: the model is of another family.
        HostError: the CLIP does not belong to it, knows the name already, or the model lacks layers of the offset.
    """
    inversion.require_family(family_of(model))
    clone = model.clone()
    if offset_strength != 0 and inversion.offset:
        _patch(clone, inversion, offset_strength)
    return clone, with_tokens(clip, {inversion.name: inversion.vectors(token_strength)})


def _patch(model: comfy.model_patcher.ModelPatcher, inversion: Inversion, strength: float) -> None:
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(lora(inversion), keys, log_missing=False)
    done = model.add_patches(patches, strength)
    if len(done) != len(inversion.offset):
        raise HostError(
            f"<{inversion.name}> changes {len(inversion.offset)} layers, but this {family_of(model)} model has only "
            f"{len(done)} of them: it is of another build. Learn the inversion again on this model"
        )


def with_tokens(clip: comfy.sd.CLIP, learned: Mapping[str, Vectors]) -> comfy.sd.CLIP:
    """A clone of the CLIP in whose prompts ``<name>`` stands for the learned vectors.

    Raises:
        HostError: a name is taken, an encoder has no vectors, or vectors have another width than its embeddings.
    """
    clone = clip.clone()
    clone.tokenizer = placing_tokenizer(clip, learned)
    return clone


def placing_tokenizer(clip: comfy.sd.CLIP, learned: Mapping[str, Vectors]) -> Any:
    """A copy of the CLIP's tokenizer that knows the learned vectors; raises as `with_tokens` does."""
    placing = copy.copy(clip.tokenizer)
    for attribute, tokenizer in text_tokenizers(clip).items():
        setattr(placing, attribute, _placing(tokenizer, learned))
    return placing


def text_tokenizers(clip: comfy.sd.CLIP) -> dict[str, SDTokenizer]:
    """The CLIP's tokenizers by the attribute they lie in, which is also their encoder's: "clip_l", "clip_g", ...

    Raises:
        HostError: there are none ComfyUI could place embeddings with.
    """
    found = {name: value for name, value in vars(clip.tokenizer).items() if isinstance(value, SDTokenizer)}
    if not found:
        raise HostError(
            f"tokens cannot be placed in the prompts of a {type(clip.tokenizer).__name__}: use a CLIP- or T5-type text "
            "encoder, or the offset alone: Save Inversion with stock_files, then Load LoRA"
        )
    return found


def knows_word(clip: comfy.sd.CLIP, word: str) -> bool:
    """Whether a word is one token of a text encoder's vocabulary."""
    for tokenizer in text_tokenizers(clip).values():
        ids = tokenizer.tokenizer(word)["input_ids"][tokenizer.tokens_start :]
        if len(ids) - bool(tokenizer.tokenizer_adds_end_token) == 1:
            return True
    return False


class _Placing:
    """Mixed into a copy of a tokenizer: ``<name>`` becomes the embedding of that name.

    The text is rewritten to ComfyUI's own ``embedding:`` syntax, so that weights, chunks and word ids stay its own.
    """

    learned: dict[str, Tensor]
    embedding_directory: Any

    def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> Any:
        for name in self.learned:
            text = re.sub(rf"\s*<{re.escape(name)}>", rf" embedding:<{name}> ", text)
        return super().tokenize_with_weights(text, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _try_get_embedding(self, embedding_name: str) -> tuple:
        first, _, rest = embedding_name.strip().partition(" ")
        if first[:1] == "<" and first[1:-1] in self.learned:
            name = (first,) if _names_are_answered() else ()
            return self.learned[first[1:-1]], *name, rest.strip()
        return super()._try_get_embedding(embedding_name)  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def _names_are_answered() -> bool:
    """Whether tokenizers answer (embedding, its name, rest of the text), as in newer versions, or without the name."""
    bare = object.__new__(SDTokenizer)
    bare.embedding_directory, bare.embedding_size, bare.embedding_key = [], 0, ""
    return len(bare._try_get_embedding("nothing")) == 3


@functools.cache
def _placing_class(base: type) -> type:
    return type(f"Placing{base.__name__}", (_Placing, base), {})


def _placing(tokenizer: SDTokenizer, learned: Mapping[str, Vectors]) -> Any:
    known = dict(getattr(tokenizer, "learned", {}))
    for name, vectors in learned.items():
        if name in known:
            raise HostError(f"<{name}> is already in use on this CLIP: learn the second inversion under another name")
        known[name] = _vectors(name, vectors, tokenizer)
    placed: Any = copy.copy(tokenizer)
    if not isinstance(placed, _Placing):
        placed.__class__ = _placing_class(type(tokenizer))
    placed.learned = known
    # Without a folder ComfyUI does not look for embeddings at all.
    placed.embedding_directory = placed.embedding_directory or []
    return placed


def _vectors(name: str, vectors: Vectors, tokenizer: SDTokenizer) -> Tensor:
    key, width = tokenizer.embedding_key, tokenizer.embedding_size
    if key not in vectors:
        raise HostError(
            f"<{name}> was learned for {', '.join(sorted(vectors))}, but this CLIP wants {key}: "
            "connect the CLIP of the same checkpoint"
        )
    found = vectors[key]
    if found.shape[1] != width:
        raise HostError(
            f"<{name}> has vectors of width {found.shape[1]} for {key}, but this CLIP's are {width}: "
            "connect the CLIP of the same checkpoint"
        )
    return torch.clone(found) if found.is_inference() else found
