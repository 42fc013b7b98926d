"""References: images as the model sees them, and the bank that keeps what the model saw in them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Reference:
    """An image for a model to read from, at any size. Immutable.

    Attributes:
        latent: clean latent (1, C, h, w) as the autoencoder gave it, on the CPU.
        mask: (1, 1, h, w) in [0, 1] on the latent's grid, 1 where the reference may be read; None means everywhere.
        conditioning: the host's own conditioning for the reference's pass; None lets the host use the run's negative.
        noise_seed: seed of the fixed noise the latent is re-noised with at every step.
    """

    latent: Tensor
    mask: Tensor | None = None
    conditioning: Any = None
    noise_seed: int = 0
    content: str = field(init=False)

    def __post_init__(self) -> None:
        if self.latent.ndim != 4 or self.latent.shape[0] != 1:
            raise ValueError(
                f"a reference is one image with a latent (1, C, h, w), but this one is {tuple(self.latent.shape)}: "
                "encode images one by one"
            )
        if self.mask is not None and self.mask.shape != (1, 1, *self.latent.shape[-2:]):
            raise ValueError(
                f"the mask is {tuple(self.mask.shape)}, but it must lie on the latent's grid: "
                f"(1, 1, {self.latent.shape[-2]}, {self.latent.shape[-1]})"
            )
        if self.mask is not None and not bool((self.mask > 0).any()):
            raise ValueError("the mask is empty: nothing of the reference could be read. Paint it or leave it out")
        object.__setattr__(self, "content", _digest(self.latent, self.noise_seed))

    def __deepcopy__(self, memo: dict) -> Reference:
        return self  # immutable: hosts that copy their options may share it

    def noise(self) -> Tensor:
        """The reference's fixed noise (1, C, h, w), float32 on the CPU: the same on every device and in every run."""
        generator = torch.Generator().manual_seed(self.noise_seed)
        return torch.randn(self.latent.shape, generator=generator)


def _digest(latent: Tensor, seed: int) -> str:
    digest = hashlib.sha256(f"{tuple(latent.shape)} {seed} ".encode())
    digest.update(latent.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


class ReferenceBank:
    """Hidden states of references by key, least recently used first out once the budget is spent.

    Args:
        budget: bytes of tensors to keep at most. One entry larger than the budget is not kept at all.
    """

    def __init__(self, budget: int) -> None:
        if budget < 0:
            raise ValueError(f"budget is {budget} bytes, but it cannot be negative")
        self.budget = budget
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[Hashable, dict[Hashable, Tensor]] = OrderedDict()

    def get(self, key: Hashable) -> dict[Hashable, Tensor] | None:
        """The entry of this key, now the most recently used; None if there is none."""
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return entry

    def put(self, key: Hashable, entry: dict[Hashable, Tensor]) -> None:
        """Keep an entry (site -> tensor), dropping the least recently used ones to stay in budget."""
        self._drop(key)
        size = _size(entry)
        if size > self.budget:
            return
        while self.bytes + size > self.budget:
            self._drop(next(iter(self._entries)))
        self._entries[key] = entry
        self.bytes += size

    def _drop(self, key: Hashable) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.bytes -= _size(entry)


def _size(entry: dict[Hashable, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in entry.values())
