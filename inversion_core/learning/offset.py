"""A low-rank change of a model's linear layers, added to what they give: the layers themselves are never touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import PROJECTIONS, LearningError, LearningModel

Kind = Literal["self", "cross", "feed_forward"]


@dataclass(frozen=True)
class Sites:
    """Where an offset goes.

    Attributes:
        kinds: of attention, and the feed-forward layers behind them.
        projections: of each attention: "to_q", "to_k", "to_v", "to_out.0".
        within: beginnings of the layers' names, such as ``output_blocks.0.1.`` of SDXL, B-LoRA's block of content
            (arXiv 2403.14572); all without it.
    """

    kinds: tuple[Kind, ...]
    projections: tuple[str, ...] = ("to_k", "to_v")
    within: tuple[str, ...] = ("",)

    def layers(self, model: LearningModel) -> dict[str, nn.Module]:
        """The chosen linear layers by their names in files, such as ``<attention>.<projection>``.

        Raises:
            LearningError: nothing is left.
        """
        attentions = model.attentions()
        chosen = {
            f"{name}.{projection}": attention.projections[projection]
            for name, attention in attentions.items()
            if attention.kind in self.kinds and name.startswith(self.within)
            for projection in self.projections
        }
        if "feed_forward" in self.kinds:
            chosen |= {name: one for name, one in model.feed_forwards().items() if name.startswith(self.within)}
        if not chosen:
            raise LearningError(
                f"nothing of kind {' or '.join(self.kinds)} lies within {', '.join(self.within)}: "
                f"the model has the attentions {', '.join(sorted(attentions)) or 'none'}"
            )
        return chosen


EVERYWHERE = Sites(("self", "cross", "feed_forward"), PROJECTIONS)
SHAPE_SITES = EVERYWHERE
APPEARANCE_SITES = Sites(("self", "feed_forward"))


class LowRank(nn.Module):
    """``up(down(x))`` beside a layer, zero at the start."""

    def __init__(self, inputs: int, outputs: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.down = nn.Parameter((torch.rand(rank, inputs, generator=generator) * 2 - 1) * bound)
        self.up = nn.Parameter(torch.zeros(outputs, rank))


def adding(up: Tensor, down: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A forward hook for a linear layer: ``output (..., out) + up(down(x))`` in one pass over the output, which may be
    the widest of the model."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        low = F.linear(inputs[0], down.to(inputs[0].dtype)).to(output.dtype)
        total = torch.addmm(output.flatten(0, -2), low.flatten(0, -2), up.to(output.dtype).T)
        return total.view(output.shape)

    return hook


class Offset(nn.Module):
    """Low-rank offsets for several linear layers.

    Args:
        sizes: layer name -> (inputs, outputs).
        rank: of each offset; at most the smaller side of its layer.
        seed: of the random half. The other half is zero.
    """

    def __init__(self, sizes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> None:
        super().__init__()
        if rank < 1:
            raise LearningError(f"the offset's rank is {rank}, but it must be at least 1")
        generator = torch.Generator().manual_seed(seed)
        self.names = tuple(sorted(sizes))
        self._layers = nn.ModuleList(LowRank(*sizes[name], min(rank, *sizes[name]), generator) for name in self.names)

    def weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer name -> (up (out, r), down (r, in)): the layer's weight would change by ``up @ down``."""
        return {name: (layer.up, layer.down) for name, layer in self._named()}

    def _named(self) -> Iterator[tuple[str, Any]]:
        return zip(self.names, self._layers, strict=True)

    @contextmanager
    def applied(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """While inside, each named layer gives ``W x + up(down(x))``. The layers lose the hook whatever happens."""
        handles = []
        try:
            for name, layer in self._named():
                handles.append(layers[name].register_forward_hook(adding(layer.up, layer.down)))
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def recorded(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """While inside, what each layer last gave is put into the dictionary under its name."""
    seen: dict[str, Tensor] = {}
    handles = []

    def recording(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            seen[name] = output

        return hook

    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_hook(recording(name)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
