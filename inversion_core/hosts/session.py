"""What every UNet host does with injections: one sampling run, one evaluation of the model, one attention call.

A host lists its sites, captures hidden states, and hands over the tokens of each self-attention call. The references'
tokens are appended to them before the layer projects, so that LoRA, quantisation and offload keep working; after the
projection they are taken apart again and given to the operator.

    call = session.prepare(site, n, grid, rows, layer)        # None: nothing to do here
    queries, keys, values = call.join(call.hidden, context, value, call.carried)
    out = call.attention(*project(queries, keys, values), attend)
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import (
    Attend,
    AttentionEdit,
    Beside,
    ReferenceTokens,
    Tokens,
    attention_weighted_adain,
    edited_attention,
    plain_attention,
    reading_map,
)
from ..correspondence import Correspondence, SparseMap
from ..injection import Injection, Window
from ..reference import Reference
from ..sites import Site, select
from ..statistics import standardise
from .base import Crop, Grid, map_to_tokens, mask_to_tokens, tokens_to_map
from .places import Places
from .report import Report

States = dict[str, Tensor]
"""What the model saw in a reference: the input (1, C, h, w) of each self-attention by its name, and of `features`.

Where a session's states are `projected`: what each attention was given instead, (1, C, h, w) by its `stored` name."""
FEATURES = "features"


def stored(site: str, role: str) -> str:
    """The name of a self-attention's queries, keys or values ("q", "k" or "v") among projected states."""
    return f"{site}.{role}"


class Rows(NamedTuple):
    """Consecutive rows of the batch that belong to one prompt, and the part of the picture that they see."""

    start: int
    stop: int
    positive: bool
    crop: Crop


class Layer(NamedTuple):
    """A self-attention layer's own projections, called as modules: their weights may be quantised or elsewhere."""

    to_q: Callable[[Tensor], Tensor]
    to_k: Callable[[Tensor], Tensor]
    heads: int


class _Plan(NamedTuple):
    """An injection with its choice of sites made on this model.

    `edits`: what is left of its edit, by whether its appearance, its shape and its matches are at work.
    """

    injection: Injection
    sites: frozenset[str]
    shape_sites: frozenset[str]
    edits: dict[tuple[bool, ...], AttentionEdit | None]


class _Active(NamedTuple):
    """An injection at work in this evaluation, with the states of the references that are."""

    plan: _Plan
    appearance: tuple[tuple[Reference, States], ...]
    shape: States | None
    matching: bool


@dataclass
class Session:
    """One sampling run.

    Args:
        injections: what is asked for.
        sites: the model's self-attentions in the order in which they run.
        projected: whether the states are queries, keys and values as the attention gets them, not what a layer still
            has to project; `normalise` then has nothing to work on.

    Raises:
        ValueError: an injection's sites mean nothing on this model.
    """

    injections: tuple[Injection, ...]
    sites: Sequence[Site]
    projected: bool = False
    report: Report = field(init=False)
    _plans: list[_Plan] = field(init=False)
    _now: list[_Active] = field(default_factory=list, init=False)
    _shared: dict[Any, Any] = field(default_factory=dict, init=False)
    _maps: dict[tuple[Correspondence, Grid, Grid], SparseMap] = field(default_factory=dict, init=False)
    _anew: dict[Injection, tuple[Correspondence, ...]] = field(default_factory=dict, init=False)
    _seen: dict[Injection, int] = field(default_factory=dict, init=False)
    _measuring: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._plans = []
        for one in self.injections:
            sites = select(one.sites, self.sites) if one.appearance or one.shape_sites is None else frozenset()
            shape_sites = sites if one.shape_sites is None else select(one.shape_sites, self.sites)
            edits = {told: one.at(*told) for told in itertools.product((False, True), repeat=3)}
            self._plans.append(_Plan(one, sites, shape_sites, edits))
        order = [site.name for site in self.sites]
        edited = {name for plan in self._plans for name in plan.sites | plan.shape_sites}
        self.report = Report([name for name in order if name in edited])

    def wanted(self, reference: Reference) -> frozenset[str]:
        """What has to be captured of a reference, for all the injections that read it together."""
        names: set[str] = set()
        for plan in self._plans:
            injection, edit = plan.injection, plan.injection.edit
            if any(same_states(reference, one) for one in injection.appearance):
                names |= self._stored(plan.sites, "qkv" if edit.qk_stats else "kv")
            if injection.shape is not None and same_states(reference, injection.shape):
                if edit.shape_query > 0 or edit.shape_key > 0:
                    names |= self._stored(plan.shape_sites, "qk" if edit.shape_key > 0 else "q")
                names |= {FEATURES} if injection.feature_strength > 0 else set()
        return frozenset(names)

    def _stored(self, sites: frozenset[str], roles: str) -> frozenset[str]:
        """The names of the states that serve these roles at these sites."""
        if self.projected:
            return frozenset(stored(site, role) for site in sites for role in roles)
        return sites

    def begin(self, states: Callable[[Reference], States], within: Callable[[Window], bool]) -> None:
        """Start an evaluation of the model: decide what is at work and see that its references are known.

        Args:
            states: what the model saw in a reference at this noise level, from a bank or from a pass.
            within: whether this noise level lies in a window.
        """
        self._now = []
        for plan in self._plans:
            one = plan.injection
            appearance = one.appearance if within(one.window) else ()
            shape = one.shape if within(one.shape_window) else None
            if appearance or shape is not None:
                found = tuple((reference, states(reference)) for reference in appearance)
                layout = None if shape is None else states(shape)
                self._now.append(_Active(plan, found, layout, within(one.match_window)))
        if self._now:
            window = self._now[0].plan.injection.window
            early = within(Window(window.start, (window.start + window.end) / 2))
            self._measuring = self.report.wants_measure(early)

    @property
    def active(self) -> bool:
        """Whether anything is at work in this evaluation."""
        return bool(self._now)

    def predicted(self, clean: Tensor, rows: Sequence[Rows]) -> bool:
        """Look at the picture that the model now has in mind, where an injection asks for that; whether one did.

        Args:
            clean: (B, C, h, w), the predicted clean latent of this evaluation.
            rows: the prompts that the batch consists of; the first that is positive and sees the whole picture counts.
        """
        whole = [row.start for row in rows if row.positive and row.crop.size == row.crop.full]
        looked = False
        for plan, appearance, _, matching in self._now:
            injection, refresh = plan.injection, plan.injection.refresh
            if refresh is None or not (appearance and matching and whole):
                continue
            self._seen[injection] = self._seen.get(injection, 0) + 1
            if self._seen[injection] % refresh.every == 0:
                seen = refresh.look(clean[whole[0] : whole[0] + 1])
                self._anew[injection] = tuple(pair.seen_anew(seen) for pair in injection.matches)
                self._maps.clear()
                looked = True
        return looked

    def end(self) -> None:
        """Finish an evaluation of the model, whether it succeeded or not."""
        self._now, self._measuring = [], False
        self._shared.clear()

    # --- inside the model ---------------------------------------------------------------------------------------------

    def features(self, h: Tensor, rows: Sequence[Rows]) -> Tensor:
        """Blend the shape references' decoder features into the output's (B, C, h, w)."""
        for plan, _, states, _ in self._now:
            injection = plan.injection
            share = injection.feature_strength * injection.edit.strength
            if states is None or share == 0 or not _concerns(injection, rows):
                continue
            grid, parts = Grid(*h.shape[-2:]), []
            for row in rows:
                part = h[row.start : row.stop]
                if injection.rows == "all" or row.positive:
                    wanted = row.crop.of(states[FEATURES], grid, "bilinear").to(part)
                    weight: float | Tensor = share
                    if injection.mask is not None:
                        mask = injection.mask.to(part.device, torch.float32)
                        weight = row.crop.of(mask, grid, "area").to(part) * share
                    part = torch.lerp(part, wanted.expand_as(part), weight)
                parts.append(part)
            h = torch.cat(parts)
            self.report.count(FEATURES)
        return h

    def prepare(
        self,
        site: str,
        n: Tensor,
        grid: Grid,
        rows: Sequence[Rows],
        layer: Layer | None,
        places: Places | None = None,
    ) -> AttentionCall | None:
        """What is to be done to a self-attention call, or None.

        Args:
            site: its name.
            n: (B, N, C), what enters the layer; projected, the queries.
            grid: rows and columns of these tokens.
            rows: the prompts that the batch consists of.
            layer: the layer's projections; None where the states are projected already.
            places: where the tokens are; None where queries and keys know nothing of it.
        """
        parts, hidden = [], n
        for plan, appearance, states, matching in self._now:
            injection = plan.injection
            if not _concerns(injection, rows):
                continue
            reads = appearance if site in plan.sites else ()
            shape = states if site in plan.shape_sites else None
            edit = plan.edits[bool(reads), shape is not None, matching]
            if edit is None:
                continue
            part = _Part(injection, edit, [], self.projected)
            if edit.matched < 1:
                part.reads = [self._readable(one, found, site, edit, n) for one, found in reads]
                if places is not None:
                    part.reads = [_placed(one, places, grid, injection) for one in part.reads]
            if edit.matched > 0:
                source = stored(site, "v") if self.projected else site
                part.matched = self._matched(site, injection, [found[source] for _, found in reads], grid, rows, n)
            if injection.mask is not None:
                part.mask = self._mask(injection.mask, grid, rows, n)
            if reads and injection.shape is not None and injection.shape.mask is not None:
                part.around = self._mask(injection.shape.mask, grid, rows, n)
            if shape is not None and _asks(part) and (edit.shape_query > 0 or edit.shape_key > 0):
                part.shape, part.shape_keys = self._layout(shape, site, edit, grid, rows, n, places)
            if edit.reference == "normalise":
                assert layer is not None  # hosts with projected states refuse it
                hidden = _normalised(part, hidden, rows, layer)
            parts.append(part)
        if not parts:
            return None
        change = _relative(hidden, n) if self._measuring and hidden is not n else None
        return AttentionCall(site, hidden, parts, rows, self.report, self._measuring, change)

    def _layout(
        self,
        states: States,
        site: str,
        edit: AttentionEdit,
        grid: Grid,
        rows: Sequence[Rows],
        like: Tensor,
        places: Places | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The shape reference's tokens that queries are made of, and those that keys are; None where none are."""

        def tokens(name: str) -> Tensor:
            maps = states[name]
            seen = Grid(*maps.shape[-2:])
            move = None if places is None else partial(places.within, seen=seen, picture=grid)
            return _for_rows(maps, grid, "bilinear", rows, like, move)

        q = tokens(stored(site, "q") if self.projected else site)
        if edit.shape_key == 0:
            return q, None
        return q, tokens(stored(site, "k")) if self.projected else q

    def _readable(
        self, reference: Reference, states: States, site: str, edit: AttentionEdit, like: Tensor
    ) -> _Readable:
        """A reference's tokens (1, M, C) that may be read: a masked-out one is not even projected."""
        if not self.projected:
            tokens = map_to_tokens(states[site]).to(like)
            return self._unmasked(reference, Grid(*states[site].shape[-2:]), tokens, tokens, tokens)
        maps = [states[stored(site, role)] for role in ("qkv" if edit.qk_stats else "kv")]
        *q, k, v = (map_to_tokens(one).to(like) for one in maps)
        return self._unmasked(reference, Grid(*maps[-1].shape[-2:]), q[0] if q else k, k, v)

    def _unmasked(self, reference: Reference, grid: Grid, q: Tensor, k: Tensor, v: Tensor) -> _Readable:
        if reference.mask is None:
            return _Readable(reference, q, k, v, None, grid)
        key = ("readable", id(reference), grid)
        if key not in self._shared:
            mask = mask_to_tokens(reference.mask.to(torch.float32), grid)[0]
            # A token counts fully once half of it is the object; thin objects keep their best tokens instead.
            kept = (mask >= mask.amax().clamp(max=0.5)).nonzero().flatten()
            self._shared[key] = kept.to(k.device)
        kept = self._shared[key]
        by_source = {id(x): x.index_select(1, kept) for x in (q, k, v)}
        return _Readable(reference, by_source[id(q)], by_source[id(k)], by_source[id(v)], kept, grid)

    def _matched(
        self, site: str, injection: Injection, states: list[Tensor], grid: Grid, rows: Sequence[Rows], like: Tensor
    ) -> Tensor:
        """What features let the tokens of a call read, (B or 1, N, C): the references' hidden states, before the layer
        projects them, or their values where it has. A projection is linear and the weights sum to 1, so it makes no
        difference when they are mixed, and a pack that cuts or merges the tokens can do the same to these."""
        whole, read = rows[0].crop.whole(grid), 0.0
        total = sum(reference.strength for reference in injection.appearance)
        matches = self._anew.get(injection, injection.matches)
        for reference, pair, state in zip(injection.appearance, matches, states, strict=True):
            tokens = map_to_tokens(state).to(like)
            found = self._map(pair, whole, Grid(*state.shape[-2:]), tokens)
            read = read + found.apply(tokens[:, None])[:, 0] * (reference.strength / total)
        assert isinstance(read, Tensor)
        if self._measuring:
            self._look(site, matches[0], states[0], whole)
        return _for_rows(tokens_to_map(read, whole), grid, "bilinear", rows, like)

    def _map(self, pair: Correspondence, grid: Grid, reference_grid: Grid, like: Tensor) -> SparseMap:
        """A pair's map where the model works: brought there once a run, not in every step."""
        key = (pair, grid, reference_grid)
        if key not in self._maps:
            found = pair.at(grid, reference_grid)
            self._maps[key] = SparseMap(found.index.to(like.device), found.weight.to(like))
        return self._maps[key]

    def _look(self, site: str, pair: Correspondence, state: Tensor, grid: Grid) -> None:
        """Remember how much features let each token of the first reference be read, for the report's picture."""
        seen = Grid(*state.shape[-2:])
        index, weight = self._map(pair, grid, seen, state)
        share = weight.new_zeros(seen.height * seen.width, dtype=torch.float32)
        self.report.look(site, share.index_add(0, index.flatten(), weight.flatten().float()), None, seen)

    def _mask(self, mask: Tensor, grid: Grid, rows: Sequence[Rows], like: Tensor) -> Tensor:
        """A mask over the whole picture at the tokens of a call: (B or 1, N, 1)."""
        key = ("mask", id(mask), grid, tuple(rows))
        if key not in self._shared:
            whole = mask.to(like.device, torch.float32)
            self._shared[key] = _for_rows(whole, grid, "area", rows, like)
        return self._shared[key]


class _Readable(NamedTuple):
    """What of one appearance reference may be read at a site: tokens (1, M, C), their numbers among the grid's.

    `q`, `k` and `v` are one tensor where the layer still has to project them.
    """

    reference: Reference
    q: Tensor
    k: Tensor
    v: Tensor
    kept: Tensor | None
    grid: Grid
    k_stats: Tensor | None = None
    """The keys over the picture, where statistics are matched and `k` may lie beside it."""


class _Place(NamedTuple):
    """Where (b, n, C) tokens lie among those that are projected together."""

    start: int
    rows: int
    tokens: int

    def of(self, x: Tensor) -> Tensor:
        """Its part (b, H, n, D) of the projected (1, H, T, D)."""
        span = x.narrow(2, self.start, self.rows * self.tokens)
        return span if self.rows == 1 else span[0].unflatten(1, (self.rows, self.tokens)).transpose(0, 1)


class _Joined:
    """Tokens side by side in a single row: what is the same for the whole batch is then projected only once.

    Args:
        filler: (1, 1, C), what is projected where nothing is added: some layers cannot take no tokens at all.
    """

    def __init__(self, filler: Tensor) -> None:
        self._filler = filler
        self._parts: list[Tensor] = []
        self._end = 0

    def add(self, x: Tensor) -> _Place:
        """Append (b, n, C)."""
        place = _Place(self._end, *x.shape[:2])
        self._parts.append(x)
        self._end += place.rows * place.tokens
        return place

    def tokens(self) -> Tensor:
        """All of them, (1, T, C)."""
        flat = [one.reshape(1, -1, one.shape[2]) for one in self._parts or [self._filler]]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)

    def same(self, other: _Joined) -> bool:
        """Whether both hold the same tensors."""
        return len(self._parts) == len(other._parts) and all(map(operator.is_, self._parts, other._parts))


class _Places(NamedTuple):
    """Where a part's tokens lie: the shape's queries and keys; the values that features chose; each appearance
    reference's queries, keys and values, and keys for statistics."""

    shape_q: _Place | None
    shape_k: _Place | None
    matched: _Place | None
    reads: list[tuple[_Place | None, _Place, _Place, _Place | None]]


@dataclass
class _Part:
    """One injection's share of a call. `shape`, `matched`, `mask` and `around` are (B or 1, N, channels), token by
    token."""

    injection: Injection
    edit: AttentionEdit
    reads: list[_Readable]
    projected: bool = False
    """Whether the host gives queries, keys and values: its own ones then cost no projection."""
    shape: Tensor | None = None
    shape_keys: Tensor | None = None
    """The shape's tokens as keys: in the order of the own keys, which are never merged."""
    matched: Tensor | None = None
    """What features let the tokens read."""
    mask: Tensor | None = None
    around: Tensor | None = None
    """Appearance goes where the shape reference's object is; around it only the layout is kept."""
    at: _Places | None = None

    @property
    def maps(self) -> list[Tensor]:
        """Everything that belongs to the output's tokens one by one."""
        return [one for one in (self.shape, self.matched, self.mask, self.around) if one is not None]

    def with_maps(self, maps: Sequence[Tensor]) -> _Part:
        """The same with other `maps`, given in their order."""
        left = iter(maps)
        names = ("shape", "matched", "mask", "around")
        return replace(self, **{name: next(left) for name in names if getattr(self, name) is not None})

    def edits_all(self, rows: Sequence[Rows]) -> bool:
        """Whether every row is edited."""
        return self.injection.rows == "all" or all(row.positive for row in rows)

    def groups(self, rows: Sequence[Rows], tiles: int) -> list[tuple[slice, bool]]:
        """Slices of the batch, and whether they are edited."""
        if self.edits_all(rows):
            return [(slice(0, rows[-1].stop * tiles), True)]
        return [(slice(row.start * tiles, row.stop * tiles), row.positive) for row in rows]


@dataclass
class AttentionCall:
    """One self-attention call to be edited.

    Attributes:
        hidden: (B, N, C) what enters the layer, `normalise` applied; the very tensor handed in where nothing is.
    """

    site: str
    hidden: Tensor
    parts: list[_Part]
    rows: Sequence[Rows]
    report: Report
    measuring: bool
    change: Tensor | None = None
    batch: int = 0
    tiles: int = 1
    own: tuple[_Place | None, _Place | None, _Place | None] = (None, None, None)
    """Where the output's own queries, keys and values lie; None: nothing reads them, they are not even projected."""

    @property
    def carried(self) -> list[Tensor]:
        """What belongs to the tokens one by one, (B or 1, N, c) each: who reorders or merges the tokens must do the
        same to these."""
        return [one for part in self.parts for one in part.maps]

    def join(
        self, n: Tensor, context: Tensor, value: Tensor, carried: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Append the references' tokens: what the layer shall project to q, to k and to v, (1, T, C) each.

        Everything lies in one row, whatever the batch: a projection works token by token. T may differ among the three.

        Args:
            n: (B', N', C); another pack may have cut each row into tiles (B' a multiple of B) or merged its tokens.
            context: (B or B', M, C), the own keys' source; of batch B it is cut into tiles as the host would.
            value: (B or B', M, C), the own values' source.
            carried: as given by `carried`, reordered and merged as n was.
        """
        self.batch, self.tiles = n.shape[0], n.shape[0] // self.rows[-1].stop
        left = list(carried)
        for i, part in enumerate(self.parts):
            taken, left = left[: len(part.maps)], left[len(part.maps) :]
            self.parts[i] = part.with_maps(taken)
        same = value is context
        context = _tiled(context, n)
        value = context if same else _tiled(value, n)
        plain = self.measuring or len(self.parts) > 1 or any(_needs_plain(part, self.rows) for part in self.parts)
        q, k, v = (_Joined(n[:1, :1]) for _ in range(3))
        self.own = (
            q.add(n) if plain or any(_needs_queries(part) for part in self.parts) else None,
            k.add(context) if plain or any(_needs_keys(part) for part in self.parts) else None,
            v.add(value) if plain or any(_needs_values(part) for part in self.parts) else None,
        )
        for part in self.parts:
            shape_k = part.shape_keys
            if shape_k is not None and self.tiles > 1:
                shape_k = _tiled(shape_k.expand(self.rows[-1].stop, -1, -1), n)
            edit = part.edit
            reads = part.reads if edit.reference in ("replace", "extend") or edit.qk_stats else []
            part.at = _Places(
                None if part.shape is None else q.add(part.shape),
                None if shape_k is None else k.add(shape_k),
                None if part.matched is None else v.add(part.matched),
                [
                    (
                        q.add(x.q) if edit.qk_stats else None,
                        k.add(x.k),
                        v.add(x.v),
                        None if x.k_stats is None else k.add(x.k_stats),
                    )
                    for x in reads
                ],
            )
        keys = k.tokens()
        return q.tokens(), keys, keys if v.same(k) else v.tokens()

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend, beside: Beside | None = None) -> Tensor:
        """Take the joined tokens (1, H, T, D) apart and let the operator work: (B', H, N', D).

        `beside`: what every query of the whole batch reads besides.
        """
        plain: Tensor | None = None
        total: Tensor | None = None
        for part in self.parts:
            groups = part.groups(self.rows, self.tiles)
            own, shape = self._tokens(part, q, k, v, beside is not None)
            done = []
            for at, edited in groups:
                mine = own if len(groups) == 1 else Tokens(*(x[at] for x in own))
                near = None if beside is None else _beside_of_rows(beside, at)
                done.append(
                    self._edited(part, mine, shape, q, k, v, at, near, attend)
                    if edited
                    else plain_attention(mine, near, attend)
                )
            edited = done[0] if len(done) == 1 else torch.cat(done)
            if total is None:
                total = edited
            else:
                # Several injections on one site add their changes, so that disjoint masks do not disturb each other.
                plain = plain_attention(own, beside, attend) if plain is None else plain
                total = total + (edited - plain)
        assert total is not None
        self.report.count(self.site)
        if self.measuring:
            own, _ = self._tokens(self.parts[0], q, k, v, beside is not None)
            change = _relative(total, plain_attention(own, beside))
            self.report.measure(self.site, change if self.change is None else torch.maximum(change, self.change))
            self._look(q, k)
        if total.shape[0] == self.batch:
            return total
        # Rows of one memory would make the output's projection copy its weights for each of them.
        return total.transpose(1, 2).expand(self.batch, -1, -1, -1).contiguous().transpose(1, 2)

    def _tokens(self, part: _Part, q: Tensor, k: Tensor, v: Tensor, every_row: bool) -> tuple[Tokens, Tokens | None]:
        """The output's own tokens and the shape's. What of the own is not read is empty, or the shape's instead.

        Where nothing in them depends on the row, they have a batch of one unless `every_row` is asked for: so has the
        edited attention.
        """
        assert part.at is not None
        own_q, own_k, own_v = (None if at is None else at.of(x) for at, x in zip(self.own, (q, k, v), strict=True))
        shape_q = None if part.at.shape_q is None else part.at.shape_q.of(q)
        shape_k = None if part.at.shape_k is None else part.at.shape_k.of(k)
        own_q = shape_q if own_q is None else own_q
        if own_q is None and part.at.matched is not None:
            own_q = part.at.matched.of(v)  # nothing asks, but the operator takes its shape from the queries
        own_k = shape_k if own_k is None else own_k
        assert own_q is not None
        own_v = own_q[:, :, :0] if own_v is None else own_v
        own_k = own_v if own_k is None else own_k
        batch = self.batch if every_row else max(x.shape[0] for x in (own_q, own_k, own_v))
        own = Tokens(*(x.expand(batch, -1, -1, -1) for x in (own_q, own_k, own_v)))
        return own, None if shape_q is None else Tokens(shape_q, own.k if shape_k is None else shape_k, own.v)

    def _edited(
        self,
        part: _Part,
        own: Tokens,
        shape: Tokens | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        at: slice,
        beside: Beside | None,
        attend: Attend,
    ) -> Tensor:
        """The rows `at` of a part; `own` and `beside` are theirs, all else the whole batch's."""
        assert part.at is not None
        edit = part.edit
        if shape is not None:
            shape = Tokens(*(_of_rows(x, at) for x in shape))
        references = [
            ReferenceTokens(
                at_k.of(k),
                at_v.of(v),
                strength=one.reference.strength,
                q=None if at_q is None else at_q.of(q),
                k_stats=None if at_stats is None else at_stats.of(k),
            )
            for one, (at_q, at_k, at_v, at_stats) in zip(part.reads, part.at.reads, strict=False)
        ]
        if edit.reference == "normalise":  # the hidden state has been changed already
            edit = replace(edit, reference="none")
        mask = None if part.mask is None else _of_rows(part.mask[..., 0], at)
        matched = None if part.at.matched is None else _of_rows(part.at.matched.of(v), at)
        near: dict[str, Any] = {"shape": shape, "mask_out": mask, "beside": beside, "attend": attend}
        out = edited_attention(edit, own, references, matched=matched, **near)
        if part.around is not None and (references or matched is not None):
            layout = replace(edit, reference="none", qk_stats=False, matched=0.0)
            kept = edited_attention(layout, own, **near)
            out = torch.lerp(kept, out, _of_rows(part.around, at)[:, None].to(out.dtype))
        return out

    def _look(self, q: Tensor, k: Tensor) -> None:
        """Remember where the first reference is read, for the report's picture."""
        part = self.parts[0]
        assert part.at is not None
        if part.reads and part.edit.reference in ("replace", "extend"):
            asking = part.at.shape_q if part.edit.shape_query > 0 else self.own[0]
            assert asking is not None  # while measuring, everything is projected
            first, (_, read, *_) = part.reads[0], part.at.reads[0]
            row = next(at.start for at, edited in part.groups(self.rows, self.tiles) if edited)
            share = reading_map(_of_rows(asking.of(q), slice(row, row + 1)), read.of(k))[0]
            self.report.look(self.site, share, first.kept, first.grid)


def _concerns(injection: Injection, rows: Sequence[Rows]) -> bool:
    """Whether any of these rows is to be edited."""
    return injection.rows == "all" or any(row.positive for row in rows)


def same_states(a: Reference, b: Reference) -> bool:
    """Whether two references look the same to the model, whatever their masks: they share what was captured."""
    return a is b or (a.content == b.content and a.conditioning is b.conditioning)


def _normalised(part: _Part, hidden: Tensor, rows: Sequence[Rows], layer: Layer) -> Tensor:
    """Ctrl-X's hidden state: every token gets the moments of what it would read in the references."""
    reference = torch.cat([one.k for one in part.reads], dim=1)
    strengths = [one.reference.strength for one in part.reads]
    weight = None
    if min(strengths) < max(strengths):  # as in the other modes, one reference counts relative to the others
        shares = [
            one.k.new_full(one.k.shape[:2], s / max(strengths), dtype=torch.float32)
            for one, s in zip(part.reads, strengths, strict=True)
        ]
        weight = torch.cat(shares, dim=1)

    def projected(x: Tensor, by: Callable[[Tensor], Tensor]) -> Tensor:
        return by(standardise(x.float(), layout="tokens").to(x)).unflatten(2, (layer.heads, -1)).transpose(1, 2)

    k = projected(reference, layer.to_k)
    asking = hidden if part.shape is None or part.edit.shape_query == 0 else part.shape
    mask = part.mask if part.around is None else part.around if part.mask is None else part.mask * part.around
    pieces = []
    for at, on in part.groups(rows, 1):
        h = hidden[at]
        if on:
            where = None if mask is None else _of_rows(mask[..., 0], at)
            q = projected(_of_rows(asking, at), layer.to_q).expand(h.shape[0], -1, -1, -1)
            h = attention_weighted_adain(
                h, reference, q, k, mask_ref=weight, mask_out=where, strength=part.edit.strength
            )
        pieces.append(h)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _needs_plain(part: _Part, rows: Sequence[Rows]) -> bool:
    """Whether the plain attention is computed beside the edited one, or instead of it for some rows."""
    return part.mask is not None or part.edit.strength < 1 or not part.edits_all(rows)


def _needs_queries(part: _Part) -> bool:
    """Whether the edited attention asks with own queries."""
    return _asks(part) and (part.shape is None or part.edit.shape_query < 1)


def _asks(part: _Part) -> bool:
    """Whether queries and keys have a say anywhere in the edited attention."""
    return part.edit.matched < 1 or part.around is not None or part.projected


def _needs_values(part: _Part) -> bool:
    """Whether the edited attention reads own values."""
    return _asks(part) and (part.edit.reference != "replace" or part.around is not None)


def _needs_keys(part: _Part) -> bool:
    """Whether the edited attention reads own keys."""
    return _needs_values(part) and (part.shape_keys is None or part.edit.shape_key < 1)


def _for_rows(
    maps: Tensor,
    grid: Grid,
    mode: str,
    rows: Sequence[Rows],
    like: Tensor,
    move: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Maps (1, c, h, w) over the whole picture at the tokens (B, N, c) that each row sees; (1, N, c) where all see the
    same part. `move` changes what a part of the picture is given."""

    def seen(crop: Crop) -> Tensor:
        tokens = map_to_tokens(crop.of(maps, grid, mode)).to(like)
        return tokens if move is None else move(tokens, crop=crop)

    if all(row.crop == rows[0].crop for row in rows):
        return seen(rows[0].crop)
    return torch.cat([seen(row.crop).expand(row.stop - row.start, -1, -1) for row in rows])


def _placed(one: _Readable, places: Places, grid: Grid, injection: Injection) -> _Readable:
    """A reference's keys at their places for a picture of this grid; statistics are of tokens at the picture's own."""
    statistics = injection.edit.qk_stats
    over = places.over(one.k) if statistics or injection.positions == "shared" else None
    k = places.beside(one.k, one.grid, grid) if injection.positions == "own" else over
    assert k is not None  # as one of the two is asked for
    return one._replace(
        k=k, q=places.over(one.q) if statistics else k, k_stats=over if statistics and k is not over else None
    )


def _of_rows(x: Tensor, at: slice) -> Tensor:
    return x if x.shape[0] == 1 else x[at]


def _beside_of_rows(beside: Beside, at: slice) -> Beside:
    k, v, bias = beside
    return Beside(_of_rows(k, at), _of_rows(v, at), None if bias is None else _of_rows(bias, at))


def _tiled(x: Tensor, like: Tensor) -> Tensor:
    """Keys (B, M, c) as the host cuts them for a batch of tiles: each row's tokens in as many runs as tiles."""
    return x if x.shape[0] == like.shape[0] else x.reshape(like.shape[0], -1, x.shape[-1])


def _relative(edited: Tensor, plain: Tensor) -> Tensor:
    """|edited - plain| / |plain|, on the device."""
    plain = plain.float()
    return (edited.float() - plain).norm() / plain.norm().clamp_min(1e-12)
