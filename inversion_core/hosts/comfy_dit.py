"""ComfyUI's diffusion transformers: injections on the stock samplers. `families` says which, and how they are built.

Modulation, normalisation and rotary places enter before any hook of these models is called, so what is kept of a
reference is what its own pass gave to the attention: keys and values of its picture (and queries where an edit needs
them). That is twice what hidden states would be, and a LoRA makes a new model of it. Keys are turned on to where the
injection wants the reference to lie (`places`).

Inside a run, ComfyUI's `optimized_attention_override` is called for every attention call. Where a call belongs is told
by the block's number that the model gives, and counted where it gives none. In a joint attention only the picture's
queries are edited, and read the prompt's keys beside what the edit lets them read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import torch
from torch import Tensor

from ..injection import Injection
from ..sites import Site
from . import comfy_run
from .base import Grid, HostError
from .comfy_attention import Chained, Options
from .comfy_run import KEY, Given, Run
from .families import Block, Call, Family, Layout, Sequences, family_of
from .joint import Joint
from .places import Place, Places, turned
from .session import Session, States


def attach(model: comfy.model_patcher.ModelPatcher, *injections: Injection) -> comfy.model_patcher.ModelPatcher:
    """A clone of the model with further injections; see `comfy_run.attach`."""
    return comfy_run.attach(model, DiTRun, injections)


@dataclass
class DiTRun(Run):
    """One sampling run with a diffusion transformer."""

    _turns: dict[tuple[Place, torch.device], Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for injection in self.injections:
            if injection.shape is not None:
                family_of(self.model).require_same_size(injection.shape.latent.shape, self.shape)

    @classmethod
    def sites_of(cls, model: Any) -> list[Site]:
        return family_of(model).sites(model)

    @classmethod
    def fitted(cls, model: Any, injection: Injection) -> Injection:
        return family_of(model).fitted(injection)

    def new_session(self) -> Session:
        return Session(self.injections, self.sites_of(self.model), projected=True)

    def hooked(self, options: Options, given: Given) -> Options:
        calls = _Calls.of(self.model, given)
        rows = self.rows(given.x.shape[0], Grid(*given.x.shape[-2:]), options)

        def edited(joint: Joint) -> Tensor:
            return joint.edited_by(self.session, rows, self._places(joint.layout))

        override = _Override(edited, calls, options.get("optimized_attention_override"))
        replaced = options.get("patches_replace", {})
        owners = {place: _Counted(calls, place, owner) for place, owner in replaced.get("dit", {}).items()}
        return {
            **options,
            "patches_replace": {**replaced, "dit": owners},
            "optimized_attention_override": override,
        }

    def leave(self) -> None:
        pass

    def recording(self, names: frozenset[str], states: States) -> Options:
        def keep(joint: Joint) -> Tensor:
            joint.keep(names, states, self._places(joint.layout))
            return joint.plain()

        def listen(
            executor: Any, x: Tensor, t: Tensor, concat: Any, context: Any, control: Any, options: Options, **conds: Any
        ) -> Tensor:
            calls = _Calls.of(self.model, Given(x, context, conds))
            options = {**options, "optimized_attention_override": _Override(keep, calls, None)}
            return executor(x, t, concat, context, control, options, **conds)

        options: Options = {}
        kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
        comfy.patcher_extension.add_wrapper_with_key(kind, KEY, listen, options)
        return options

    def _places(self, layout: Layout) -> Places | None:
        rotary = family_of(self.model).rotary
        return None if rotary is None else Places(rotary.first(layout), rotary.centred, self._move)

    def _move(self, x: Tensor, by: Place) -> Tensor:
        """Tokens moved as this model itself would turn them; each turn is made once a run."""
        rotary, key = family_of(self.model).rotary, (by, x.device)
        assert rotary is not None
        if key not in self._turns:
            embedder = getattr(self.model, rotary.embedder)
            place = (*by, *(0 for _ in embedder.axes_dim[len(by) :]))
            self._turns[key] = embedder(torch.tensor([[place]], device=x.device, dtype=torch.float32))[0, 0, 0]
        return turned(x, self._turns[key])


@dataclass
class _Calls:
    """Which attention call of one evaluation comes next."""

    family: Family
    model: Any
    sequences: Sequences
    _order: list[Call] = field(init=False)
    _starts: dict[Block | None, int] = field(default_factory=dict, init=False)
    _next: int = field(default=0, init=False)
    _block: Block | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._order = list(self.family.calls(self.model))
        for i, call in enumerate(self._order):
            self._starts.setdefault(call.block, i)

    @classmethod
    def of(cls, model: Any, given: Given) -> _Calls:
        text = 0 if given.context is None else given.context.shape[1]
        return cls(family_of(model), model, Sequences(given.x.shape, text, given.conds))

    def next(self, options: Options) -> Site | None:
        """The site of the next call; None for one of a prompt, of a cross-attention or of somebody else."""
        told = (options["block_type"], options["block_index"]) if "block_index" in options else None
        if told is not None and told != self._block:
            self.enter(told)
        at, self._next = self._next, self._next + 1
        call = self._order[at] if at < len(self._order) else None
        return None if call is None or (told is not None and call.block != told) else call.site

    def enter(self, block: Block) -> None:
        """The next call is this block's first."""
        self._block, self._next = block, self._starts.get(block, len(self._order))

    def leave(self, block: Block) -> None:
        """The next call is the first after this block, whether its own calls were made or not."""
        if block in self._starts:
            self._next = self._starts[block]
            while self._next < len(self._order) and self._order[self._next].block == block:
                self._next += 1

    def layout(self, site: Site) -> Layout:
        """The tokens at a site."""
        return self.family.layout_at(site, self.model, self.sequences)


@dataclass(frozen=True, eq=False)
class _Counted:
    """Another pack's replacement of a block: whether it runs the block or skips it, the count stays right."""

    calls: _Calls
    place: Any
    owner: Callable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind, number = self.place[:2]
        block = (kind.removesuffix("_block"), number)
        self.calls.enter(block)
        try:
            return self.owner(*args, **kwargs)
        finally:
            self.calls.leave(block)


@dataclass(frozen=True, eq=False)
class _Override:
    """ComfyUI's `optimized_attention_override`: calls of the picture's go to the taker, all others go on."""

    taker: Callable[[Joint], Tensor]
    calls: _Calls
    earlier: Callable | None

    def __call__(
        self, func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        attention = func if self.earlier is None else Chained(self.earlier, func)
        site = self.calls.next(kwargs.get("transformer_options") or {})
        if site is None:
            return attention(q, k, v, heads, *args, **kwargs)
        return self.taker(_joint(site, self.calls, attention, (q, k, v), heads, args, kwargs))


def _joint(
    site: Site,
    calls: _Calls,
    attention: Callable,
    qkv: tuple[Tensor, Tensor, Tensor],
    heads: int,
    args: tuple,
    kwargs: dict[str, Any],
) -> Joint:
    """Raises HostError where the tokens do not lie as this family's do."""
    split, joined = kwargs.get("skip_reshape", False), not kwargs.get("skip_output_reshape", False)
    left_out = ("mask", "skip_reshape", "skip_output_reshape")
    others = {name: value for name, value in kwargs.items() if name not in left_out}
    mask = args[0] if args else kwargs.get("mask")

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attention(q, k, v, heads, mask=mask, skip_reshape=True, skip_output_reshape=True, **others)

    def plain() -> Tensor:
        return attention(*qkv, heads, *args, **kwargs)

    # Some models give values with the heads apart already, (B, N, H, D), beside joined queries and keys.
    q, k, v = qkv if split else (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in qkv)
    layout = calls.layout(site)
    if q.shape[2] != layout.total:
        raise HostError(
            f"at {site.name} of this {calls.family.name} model the attention has {q.shape[2]} tokens, but the "
            f"prompt ({calls.sequences.text}) and the picture ({layout.grid.height} x {layout.grid.width}) explain "
            f"{layout.total}: another node adds tokens that KV Injection does not know; disable it"
        )
    return Joint(site, layout, q, k, v, mask, attend, plain, joined)
