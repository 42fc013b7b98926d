"""One attention call of a transformer in which a picture's tokens stand among others, a prompt's above all.

Only the picture's queries are edited; they read the others' keys beside what the edit lets them read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import Beside
from ..sites import Site
from .base import HostError, tokens_to_map
from .families import Layout
from .places import Places
from .session import AttentionCall, Rows, Session, States, stored


@dataclass(frozen=True)
class Joint:
    """One attention call of a transformer.

    Attributes:
        site: whose.
        layout: where the picture's tokens lie.
        q, k, v: (B, H, N, D), of all tokens.
        mask: as the model gave it.
        attend: the attention for q, k, v (B, H, N, D) and a mask.
        plain: the call as it was.
        joined: whether the heads lie side by side in the output, (B, N, H * D).
    """

    site: Site
    layout: Layout
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    plain: Callable[[], Tensor]
    joined: bool

    def keep(self, names: frozenset[str], states: States, places: Places | None) -> None:
        """Put what is wanted of a reference's own pass into `states`."""
        for role, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            name = stored(self.site.name, role)
            if name in names:
                tokens = self.tokens(x)
                tokens = tokens if places is None or role == "v" else places.kept(tokens)
                states[name] = tokens_to_map(tokens, self.layout.grid)

    def edited_by(self, session: Session, rows: Sequence[Rows], places: Places | None) -> Tensor:
        """The attention as a session wants it."""
        q = self.tokens(self.q)
        call = session.prepare(self.site.name, q, self.layout.grid, rows, None, places)
        return self.plain() if call is None else self.edited(call, q)

    def tokens(self, x: Tensor) -> Tensor:
        """The picture's part of q, k or v, heads side by side: (B, n, H * D)."""
        return x[:, :, self.layout.picture].transpose(1, 2).flatten(2)

    def edited(self, call: AttentionCall, q: Tensor) -> Tensor:
        """The call with the picture's queries edited; `q` are their tokens. All other queries attend as ever."""
        carried = [one.repeat(1, self.layout.frames, 1) for one in call.carried]
        joined = call.join(q, self.tokens(self.k), self.tokens(self.v), carried)
        heads = self.q.shape[1]
        mine, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in joined)
        picture = call.attention(mine, k, v, self.attend, self._beside())
        before = self.layout.before
        others = self._others(self.q)
        out = picture
        if others.shape[2]:
            rest = self.attend(others, self.k, self.v, self.mask)
            out = torch.cat((rest[:, :, :before], picture, rest[:, :, before:]), dim=2)
        return out.transpose(1, 2).flatten(2) if self.joined else out

    def _others(self, x: Tensor) -> Tensor:
        picture = self.layout.picture
        return torch.cat((x[:, :, : picture.start], x[:, :, picture.stop :]), dim=2)

    def _beside(self) -> Beside | None:
        k, v = self._others(self.k), self._others(self.v)
        if not k.shape[2]:
            return None
        bias = None
        if self.mask is not None:
            keys = _of_keys(self.mask, self.site)
            bias = self._others(keys[:, :, :, None])[:, 0, :, 0]
        return Beside(k, v, bias)


def _of_keys(mask: Tensor, site: Site) -> Tensor:
    """A mask that says which keys may be read, whoever asks, as (B or 1, 1, Nk) to be added to the logits."""
    if mask.ndim < 3 or mask.shape[-2] != 1 or (mask.ndim == 4 and mask.shape[1] != 1):
        raise HostError(
            f"at {site.name} another node gives the model an attention mask {tuple(mask.shape)} that differs from "
            "query to query, and KV Injection cannot follow it: take it away (for Apply Style Model, choose 'multiply' "
            "instead of 'attn_bias')"
        )
    mask = mask.reshape(mask.shape[0], 1, -1)
    return (
        mask if mask.dtype != torch.bool else torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
    )
