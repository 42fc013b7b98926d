"""Which part of one picture belongs to which part of another, by their features, as an attention map.

`output` is the picture whose layout counts (A), `reference` the one that is read (B). The map of an attention site is
`softmax_j(cos(a_i, b_j) / temperature + g_j)`: cosine similarity of the features resampled to the site's grids, and one
potential `g_j` for each reference token (see `potentials`), which masks out what must not be read and, if asked for,
sees that all of the rest is read. As the potential varies slowly over the picture, it is found once, on a coarse grid.
The largest entries of each row are kept, so that a map of N x M tokens takes N x top_k numbers, and no more than a
chunk of the whole ever exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import Descriptor, Features, Recent, digest

CHUNK_BYTES = 64 << 20
"""Largest part of a similarity matrix that exists at one time; one row is the least it takes."""
BALANCE_TOKENS = 1024
"""On how many tokens a picture the potentials are found."""
BALANCE_STEPS = 100
MAP_BYTES = 64 << 20
"""What the maps of one pair may take."""

Grid = tuple[int, int]
"""Rows and columns of tokens."""


@dataclass(frozen=True)
class Matching:
    """How features become an attention map.

    Raises:
        ValueError: a value outside its range.
    """

    descriptor: Descriptor = "tokens"
    """What is compared: tokens after the last LayerNorm, or the keys of the block."""
    centred: bool = True
    """Take from every descriptor the mean of its picture inside its mask first: what all of an object has in common is
    its appearance, which differs between the two and says nothing of the part."""
    temperature: float = 0.1
    """0.001 to 10. Of the softmax over cosine similarities: small reads one place, large an average of many."""
    top_k: int = 16
    """1 or more. How many reference tokens an output token reads at most."""
    balance: float = 1.0
    """0 to 1. 0: each output token reads what is most like it. 1: optimal transport, every readable reference token is
    read equally much in all, so that the whole appearance is used; on the demo's world it also finds the right place
    more often. Between: unbalanced transport."""

    def __post_init__(self) -> None:
        if self.descriptor not in get_args(Descriptor):
            raise ValueError(f"descriptor is {self.descriptor!r}, allowed are {', '.join(get_args(Descriptor))}")
        if not 1e-3 <= self.temperature <= 10:
            raise ValueError(f"temperature is {self.temperature}, allowed is 0.001 (one place) to 10 (all alike)")
        if self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, but at least 1 token must be read")
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance is {self.balance}, allowed is 0 (most alike) to 1 (all of the reference)")


class SparseMap(NamedTuple):
    """An attention map of N output tokens over M reference tokens, K entries a row.

    Attributes:
        index: (N, K) int64, reference tokens.
        weight: (N, K) float32, at least 0; every row sums to 1.
    """

    index: Tensor
    weight: Tensor

    def apply(self, values: Tensor) -> Tensor:
        """What the output tokens read: (B, H, M, D) -> (B, H, N, D), in the dtype of the values."""
        index, weight = self.index.to(values.device), self.weight.to(values)
        read = _read_one_by_one if values.device.type == "mps" else _read_at_once
        return read(index, weight, values)

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self)


class Nearest(NamedTuple):
    """Nearest neighbours of N output tokens among M reference tokens, and back, by cosine similarity.

    Attributes:
        there: (N,) int64, each output token's nearest readable reference token.
        back: (M,) int64, each reference token's nearest output token.
        similarity: (N,) in [-1, 1], of each output token to its nearest.
    """

    there: Tensor
    back: Tensor
    similarity: Tensor

    @property
    def mutual(self) -> Tensor:
        """(N,) bool: the nearest of the nearest is the token itself."""
        return self.back[self.there] == torch.arange(len(self.there), device=self.there.device)


class Correspondence:
    """One pair of pictures, matched. Maps are computed when first asked for, then remembered.

    Args:
        output, reference: features of one picture each, from one backbone and block.
        matching: how.
        output_mask: (1, 1, H, W) in [0, 1], any size: what of the output counts when the reference is shared out.
        reference_mask: likewise, what of the reference may be read; a soft value scales how much.

    Raises:
        ValueError: several pictures in one, features of two kinds, or a mask that is empty.
    """

    def __init__(
        self,
        output: Features,
        reference: Features,
        matching: Matching,
        output_mask: Tensor | None = None,
        reference_mask: Tensor | None = None,
    ) -> None:
        self.matching = matching
        self._given = reference, matching, output_mask, reference_mask
        self._output = _feature_map(output, matching.descriptor, "output")
        self._reference = _feature_map(reference, matching.descriptor, "reference")
        if self._output.shape[1] != self._reference.shape[1]:
            raise ValueError(
                f"the features have {self._output.shape[1]} and {self._reference.shape[1]} channels: take both from "
                "the same backbone"
            )
        self.grid, self.reference_grid = output.grid, reference.grid
        self._output_mask = _checked_mask(output_mask, "output")
        self._reference_mask = _checked_mask(reference_mask, "reference")
        if matching.centred:
            self._output = _centred(self._output, self._output_mask)
            self._reference = _centred(self._reference, self._reference_mask)
        self._potential: Tensor | None = None
        self._maps = Recent[SparseMap](MAP_BYTES, lambda found: found.bytes)

    def seen_anew(self, output: Features) -> Correspondence:
        """The same with other features of the output, as when it has changed."""
        return Correspondence(output, *self._given)

    @property
    def device(self) -> torch.device:
        """Where the maps are computed and lie: that of the features."""
        return self._output.device

    def at(self, grid: Grid, reference_grid: Grid) -> SparseMap:
        """The map of an attention site with these grids over the whole pictures, on the device of the features."""
        key = f"{grid} {reference_grid}"
        found = self._maps.get(key)
        if found is None:
            found = self._compute(grid, reference_grid)
            self._maps.put(key, found)
        return found

    def nearest(self) -> Nearest:
        """Nearest neighbours on the features' own grids, among what the masks leave."""
        readable = _weights(self._reference_mask, self.reference_grid, self._reference) > 0
        counts = _weights(self._output_mask, self.grid, self._output) > 0
        a, b = _tokens(self._output, self.grid), _tokens(self._reference, self.reference_grid)
        return nearest(a, b, counts, readable)

    def confidence(self) -> Tensor:
        """(N,) in [0, 1] on the output's own grid: 1 where going there and back ends within a token of the start.

        It falls to 0 where one ends a quarter of the longer side away, or further.
        """
        found = self.nearest()
        start = torch.arange(len(found.there), device=found.there.device)
        height, width = self.grid
        end = found.back[found.there]
        rows, columns = start // width - end // width, start % width - end % width
        distance = torch.hypot(rows.float(), columns.float())
        return (1 - (distance - 1).clamp_min(0) / (max(height, width) / 4)).clamp(0, 1)

    # Outside inference mode, where a host may be: a map may be needed in a graph later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _compute(self, grid: Grid, reference_grid: Grid) -> SparseMap:
        a, b = _tokens(self._output, grid), _tokens(self._reference, reference_grid)
        bias = self._bias(reference_grid)
        count = min(self.matching.top_k, len(b))
        parts = [(scores / self.matching.temperature + bias).topk(count, dim=1) for scores in _similarities(a, b)]
        index = torch.cat([part.indices for part in parts])
        return SparseMap(index, torch.cat([part.values.softmax(dim=1) for part in parts]))

    def _bias(self, grid: Grid) -> Tensor:
        """(M,) what is added to a reference token's score: the log of its mask, and its potential."""
        bias = _weights(self._reference_mask, grid, self._reference).log()
        if self.matching.balance == 0:
            return bias
        if self._potential is None:
            coarse, coarse_reference = _coarser(self.grid), _coarser(self.reference_grid)
            a, b = _tokens(self._output, coarse), _tokens(self._reference, coarse_reference)
            self._potential = potentials(
                a @ b.T / self.matching.temperature,
                _weights(self._output_mask, coarse, self._output),
                _weights(self._reference_mask, coarse_reference, self._reference),
                self.matching.balance,
            ).view(1, 1, *coarse_reference)
        return bias + _resized(self._potential, grid).flatten()


def rearranged(picture: Tensor, pair: Correspondence, cell: int = 8) -> Tensor:
    """The reference picture laid out like the output: each token's cell shows what the token reads, averaged likewise.

    Args:
        picture: the reference, (1, 3, H, W), any size.
        pair: its correspondence.
        cell: side of a token's cell in pixels.

    Returns:
        (1, 3, h * cell, w * cell) for the output's grid (h, w).
    """
    (h, w), (h_ref, w_ref) = pair.grid, pair.reference_grid
    fitted = F.interpolate(picture.float(), size=(h_ref * cell, w_ref * cell), mode="bilinear", antialias=True)
    cells = F.unfold(fitted, cell, stride=cell)
    read = pair.at(pair.grid, pair.reference_grid).apply(cells.transpose(1, 2)[:, None])
    return F.fold(read[:, 0].transpose(1, 2), (h * cell, w * cell), cell, stride=cell)


def potentials(scores: Tensor, rows: Tensor, columns: Tensor, balance: float, steps: int = BALANCE_STEPS) -> Tensor:
    """Sinkhorn's algorithm in logarithms: what to add to each column so that a row softmax uses the columns as wanted.

    The plan is `P_ij = exp(f_i + scores_ij + log b_j + g_j)` with row sums a (`rows`) and, for balance 1, column sums b
    (`columns`), both scaled to sum to 1: entropic optimal transport (Cuturi 2013, arXiv 1306.0895). A smaller balance
    relaxes the columns by a Kullback-Leibler term (Chizat et al. 2018, arXiv 1607.05816): each of their updates is
    scaled by it; at 0 the plan is the plain softmax. Columns of weight 0 get no share, rows of weight 0 have no say.

    Args:
        scores: (N, M), similarity over temperature.
        rows: (N,) at least 0, not all 0.
        columns: (M,) at least 0, not all 0.
        balance: 0 to 1.
        steps: of the iteration.

    Returns:
        (M,) the potential g, finite, float32 (float64 for float64 scores).
    """
    log_a, log_b = (weight.to(scores).log() for weight in (rows / rows.sum(), columns / columns.sum()))
    g = torch.zeros_like(log_b)
    for _ in range(steps):
        f = log_a - (scores + (log_b + g)).logsumexp(dim=1)
        g = -balance * (scores + f[:, None]).logsumexp(dim=0)
    return g


def nearest(a: Tensor, b: Tensor, a_counts: Tensor | None = None, b_counts: Tensor | None = None) -> Nearest:
    """Nearest neighbours of descriptors (N, C) and (M, C) of length 1, in chunks.

    Args:
        a, b: as above.
        a_counts, b_counts: (N,), (M,) bool: which may be found; None: all. All of both are searched for.
    """
    there, similarity = [], []
    best, back = a.new_full((len(b),), -math.inf), torch.zeros(len(b), dtype=torch.int64, device=a.device)
    done = 0
    for scores in _similarities(a, b):
        found = (scores if b_counts is None else scores.masked_fill(~b_counts, -math.inf)).max(dim=1)
        there.append(found.indices)
        similarity.append(found.values)
        if a_counts is not None:
            scores = scores.masked_fill(~a_counts[done : done + len(scores), None], -math.inf)
        column = scores.max(dim=0)
        back = torch.where(column.values > best, column.indices + done, back)
        best = torch.maximum(best, column.values)
        done += len(scores)
    return Nearest(torch.cat(there), back, torch.cat(similarity))


def _read_at_once(index: Tensor, weight: Tensor, values: Tensor) -> Tensor:
    """The weighted sum of chosen rows in one kernel, which is several times faster than gathering them."""
    b, h, m, d = values.shape
    rows = values.permute(2, 0, 1, 3).reshape(m, -1)
    read = F.embedding_bag(index, rows, per_sample_weights=weight, mode="sum")
    return read.view(-1, b, h, d).permute(1, 2, 0, 3)


def _read_one_by_one(index: Tensor, weight: Tensor, values: Tensor) -> Tensor:
    """The same with plain operations, for devices that have no such kernel."""
    read = values.index_select(2, index[:, 0]) * weight[:, 0, None]
    for k in range(1, index.shape[1]):
        read.addcmul_(values.index_select(2, index[:, k]), weight[:, k, None])
    return read


class CorrespondenceBank:
    """Correspondences by the content of all they are made of, least recently used first out.

    Args:
        count: how many pairs to remember at most.
    """

    def __init__(self, count: int = 4) -> None:
        self._pairs = Recent[Correspondence](count, lambda _: 1)

    def get(
        self,
        output: Features,
        reference: Features,
        matching: Matching,
        output_mask: Tensor | None = None,
        reference_mask: Tensor | None = None,
    ) -> Correspondence:
        """As `Correspondence(...)`; the one made before if nothing differs."""
        key = digest(output.content, reference.content, output.tokens.device, matching, output_mask, reference_mask)
        found = self._pairs.get(key)
        if found is None:
            found = Correspondence(output, reference, matching, output_mask, reference_mask)
            self._pairs.put(key, found)
        return found


def _similarities(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """`a @ b.T`, some rows at a time."""
    for rows in a.split(max(1, CHUNK_BYTES // (len(b) * b.element_size()))):
        yield rows @ b.T


def _feature_map(features: Features, kind: Descriptor, name: str) -> Tensor:
    """(1, C, h, w), float32."""
    found = features.descriptors(kind)
    if found.shape[0] != 1:
        raise ValueError(f"the {name} is a batch of {found.shape[0]} pictures, but one is matched with one: pick one")
    return found.detach().float().transpose(1, 2).unflatten(2, features.grid)


def _checked_mask(mask: Tensor | None, name: str) -> Tensor | None:
    if mask is None:
        return None
    if mask.ndim != 4 or mask.shape[:2] != (1, 1):
        raise ValueError(f"the {name} mask is {tuple(mask.shape)}, needed is (1, 1, H, W)")
    if not bool((mask > 0).any()):
        raise ValueError(f"the {name} mask is empty: nothing could be matched. Paint it or leave it out")
    return mask.detach().float()


def _centred(maps: Tensor, mask: Tensor | None) -> Tensor:
    """(1, C, h, w) without the mean inside the mask."""
    weight = _weights(mask, (maps.shape[2], maps.shape[3]), maps).view(1, 1, *maps.shape[2:])
    return maps - (maps * weight).sum((2, 3), keepdim=True) / weight.sum()


def _resized(maps: Tensor, grid: Grid) -> Tensor:
    """(1, C, h, w) -> (1, C, *grid), averaged where it shrinks."""
    if tuple(maps.shape[2:]) == tuple(grid):
        return maps
    return F.interpolate(maps, size=tuple(grid), mode="bilinear", antialias=True)


def _tokens(maps: Tensor, grid: Grid) -> Tensor:
    """(1, C, h, w) -> (N, C) on another grid, each of length 1."""
    return F.normalize(_resized(maps, grid).flatten(2)[0].T, dim=1)


def _weights(mask: Tensor | None, grid: Grid, like: Tensor) -> Tensor:
    """(N,) the share of each token that the mask covers; 1 without a mask."""
    if mask is None:
        return like.new_ones(grid[0] * grid[1])
    return F.interpolate(mask.to(like.device), size=tuple(grid), mode="area").flatten()


def _coarser(grid: Grid) -> Grid:
    """The grid, or one of its aspect with at most about BALANCE_TOKENS tokens."""
    scale = min(1.0, math.sqrt(BALANCE_TOKENS / (grid[0] * grid[1])))
    return max(1, round(grid[0] * scale)), max(1, round(grid[1] * scale))
