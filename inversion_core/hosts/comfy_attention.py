"""ComfyUI's attention hooks for hosts that take a call over: other packs' hooks are called, never overwritten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..attention import Attend
from .base import HostError

Options = dict[str, Any]


class Takes(Protocol):
    """Who edits attention calls: `pending` says whether the next one is to be edited."""

    @property
    def pending(self) -> bool:
        """Whether the attention call that comes next was prepared."""
        ...

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """The edited call; (B, H, N, D) in and out."""
        ...


@dataclass(frozen=True, eq=False)
class Override:
    """ComfyUI's `optimized_attention_override`: prepared calls go to the taker, all others go on."""

    taker: Takes
    earlier: Callable | None

    def __call__(
        self, func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        attention = func if self.earlier is None else Chained(self.earlier, func)
        if not self.taker.pending:
            return attention(q, k, v, heads, *args, **kwargs)
        split = kwargs.pop("skip_reshape", False)
        joined = not kwargs.pop("skip_output_reshape", False)
        kwargs.pop("mask", None)

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            layout = {"skip_reshape": True, "skip_output_reshape": True}
            return attention(q, k, v, heads, mask=mask, **layout, **kwargs)

        if not split:
            q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = self.taker.attention(q, k, v, attend)
        return out.transpose(1, 2).flatten(2) if joined else out


@dataclass(frozen=True, eq=False)
class Chained:
    """Another pack's attention override, called as the attention it overrides."""

    override: Callable
    func: Callable

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.override(self.func, *args, **kwargs)


@dataclass(frozen=True, eq=False)
class Replacement:
    """Another pack's attn1 replacement at one place: it stays the attention that the operator uses there."""

    taker: Takes
    owner: Callable

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: Options) -> Tensor:
        if not self.taker.pending:
            return self.owner(q, k, v, extra)
        heads = extra["n_heads"]

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            joined = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
            # Masks travel in extra channels of the head: the owner must not split it by the model's own width.
            return self.owner(*joined, {**extra, "dim_head": q.shape[-1]}).unflatten(2, (heads, -1)).transpose(1, 2)

        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return self.taker.attention(q, k, v, attend).transpose(1, 2).flatten(2)


def follow(
    patch: Callable, n: Tensor, context: Tensor, value: Tensor, carried: Sequence[Tensor], extra: Options
) -> tuple[Tensor, Tensor, Tensor, Sequence[Tensor]]:
    """Call another pack's attn1_patch; what it does to the order or number of tokens is done to `carried` too.

    HyperTile cuts the queries into tiles, token merging averages some of them: both treat channels alike, so what
    belongs to the tokens rides along as further channels. The merging then also looks at what rides along.

    Raises:
        HostError: the patch changes the tokens but cannot take further channels.
    """
    out = patch(n, context, value, extra)
    if not carried or out[0].shape[:2] == n.shape[:2]:
        return (*out, carried)
    widths = [n.shape[2], *(one.shape[2] for one in carried)]
    wide = torch.cat([n, *(one.expand(n.shape[0], -1, -1) for one in carried)], dim=2)
    try:
        wide, context, value = patch(wide, context, value, extra)
        n, *moved = wide.split(widths, dim=2)
    except RuntimeError as error:
        raise HostError(
            f"at {extra['block']} another pack's patch changes the number of tokens, and a shape reference or a mask "
            f"cannot follow it ({error}): disable that patch, or leave this block out of the sites"
        ) from error
    return n, context, value, moved
