"""What an artist asks for: which reference gives what to a picture, where and when. Hosts carry it out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from torch import Tensor

from .attention import AttentionEdit
from .reference import Reference


class Site(NamedTuple):
    """One self-attention, in the host's own words: ``("output", 3, 0)`` is output block 3, first transformer block."""

    block: str
    number: int
    index: int


@dataclass(frozen=True)
class Window:
    """Part of the schedule, in sampling percent: 0 is the first step, 1 the end."""

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"the window is {self.start} to {self.end}, but it must satisfy 0 <= start <= end <= 1")


@dataclass(frozen=True, eq=False)
class Injection:
    """Appearance and shape references at work on one model.

    Attributes:
        edit: what happens to each chosen self-attention.
        appearance: whose keys and values are read; None leaves appearance alone.
        window: when appearance is injected.
        shape: whose queries, keys and decoder features give the layout; None leaves shape alone.
        shape_window: when shape is injected.
        feature_strength: share of the shape reference in the decoder features that enter the feature blocks.
        mask: (1, 1, h, w) in [0, 1], 1 where the output is edited; any size, resized to each site; None: everywhere.
        sites: which self-attentions: those of the decoder (as published methods do), all, or the ones named.
        feature_blocks: decoder blocks whose incoming features the shape replaces; None means the host's default.
        rows: edit every row of the batch, or only those of the positive prompt.
    """

    edit: AttentionEdit
    appearance: Reference | None = None
    window: Window = field(default_factory=Window)
    shape: Reference | None = None
    shape_window: Window = field(default_factory=Window)
    feature_strength: float = 1.0
    mask: Tensor | None = None
    sites: frozenset[Site] | Literal["decoder", "all"] = "decoder"
    feature_blocks: frozenset[int] | None = None
    rows: Literal["all", "positive"] = "all"

    def __post_init__(self) -> None:
        if self.appearance is None and self.shape is None:
            raise ValueError("an injection needs an appearance reference, a shape reference or both, but got neither")
        if not 0 <= self.feature_strength <= 1:
            raise ValueError(f"feature_strength is {self.feature_strength}, but it must be between 0 and 1")
        if self.mask is not None and not bool((self.mask > 0).any()):
            raise ValueError("the output mask is empty: nothing would be edited. Paint it or disconnect it")

    def __deepcopy__(self, memo: dict) -> Injection:
        return self  # immutable: hosts that copy their options may share it

    @property
    def references(self) -> tuple[Reference, ...]:
        """The references this injection reads."""
        return tuple(reference for reference in (self.appearance, self.shape) if reference is not None)

    @property
    def neutral(self) -> bool:
        """True if the injection cannot change anything: hosts then attach nothing at all."""
        return self.edit.strength == 0

    def at(self, appearance: bool, shape: bool) -> AttentionEdit | None:
        """The edit with only those references that are at work now; None if nothing is left to do."""
        edit = self.edit
        if not appearance or self.appearance is None:
            edit = replace(edit, reference="none", qk_stats=False)
        if not shape or self.shape is None:
            edit = replace(edit, shape_query=0.0, shape_key=0.0)
        idle = edit.reference == "none" and not edit.qk_stats and edit.shape_query == 0 and edit.shape_key == 0
        return None if idle else edit
