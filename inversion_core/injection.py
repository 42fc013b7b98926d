"""What an artist asks for: which reference gives what to a picture, where and when. Hosts carry it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from .attention import AttentionEdit
from .correspondence import Correspondence
from .features import Features
from .reference import Reference


@dataclass(frozen=True)
class Window:
    """Part of the schedule, in sampling percent: 0 is the first step, 1 the end."""

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"the window is {self.start} to {self.end}, but it must satisfy 0 <= start <= end <= 1")

    def until(self, end: float) -> Window:
        """What of it lies before a sampling percent."""
        return Window(min(self.start, end), min(self.end, end))


@dataclass(frozen=True, eq=False)
class Refresh:
    """Matching anew while the picture takes shape.

    Attributes:
        every: after how many evaluations of the model inside the window, 1 or more.
        look: a predicted clean latent (1, C, h, w), as the model scales it -> the features of its picture.
    """

    every: int
    look: Callable[[Tensor], Features]

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is {self.every}, but at least 1 evaluation must lie between; None never refreshes")


@dataclass(frozen=True, eq=False)
class Injection:
    """Appearance and shape references at work on one model.

    Attributes:
        edit: what happens to each chosen self-attention.
        appearance: whose keys and values are read, each with its mask and strength; none leaves appearance alone.
        window: when appearance is injected.
        sites: which self-attentions read the appearance, as rules of `sites.select`.
        shape: whose queries, keys and decoder features give the layout; None leaves shape alone.
        shape_window: when shape is injected.
        shape_sites: which self-attentions take the shape's queries and keys; None means the same as `sites`.
        feature_strength: 0 to 1, share of the shape reference in the features that leave the decoder's first block
            with self-attention (block 3 of SD1.5: Plug-and-Play, arXiv 2211.12572; block 0 of SDXL: Ctrl-X).
        matches: where each part of the output reads each appearance reference, for `edit.matched`; the output is taken
            to be laid out like their `output` picture.
        refresh: when and how the output is looked at again to find the matches anew; None: never.
        match_window: when they do, inside `window`; otherwise `edit.matched` counts as 0.
        mask: (1, 1, h, w) in [0, 1], 1 where the output is edited; any size, resized to each site; None: everywhere.
        rows: edit every row of the batch, or only those of the positive prompt.
        positions: where models that turn places into queries and keys (RoPE) see the appearance references: beside the
            picture, where nothing is drawn to the same place, or over it. Without effect on others.

    Raises:
        ValueError: no reference, a share outside its range, an empty mask, not one match for each appearance reference.
    """

    edit: AttentionEdit
    appearance: tuple[Reference, ...] = ()
    window: Window = field(default_factory=Window)
    sites: str = "decoder"
    shape: Reference | None = None
    shape_window: Window = field(default_factory=Window)
    shape_sites: str | None = None
    feature_strength: float = 1.0
    matches: tuple[Correspondence, ...] = ()
    refresh: Refresh | None = None
    match_window: Window = field(default_factory=Window)
    mask: Tensor | None = None
    rows: Literal["all", "positive"] = "all"
    positions: Literal["own", "shared"] = "own"

    def __post_init__(self) -> None:
        if not self.references:
            raise ValueError("an injection needs an appearance reference, a shape reference or both, but got neither")
        if not 0 <= self.feature_strength <= 1:
            raise ValueError(f"feature_strength is {self.feature_strength}, but it must be between 0 and 1")
        if self.edit.matched > 0 and len(self.matches) != len(self.appearance):
            raise ValueError(
                f"matched reading needs one correspondence for each appearance reference, but {len(self.appearance)} "
                f"references have {len(self.matches)}"
            )
        if self.mask is not None and not bool((self.mask > 0).any()):
            raise ValueError("the output mask is empty: nothing would be edited. Paint it or disconnect it")

    def __deepcopy__(self, memo: dict) -> Injection:
        return self  # immutable: hosts that copy their options may share it

    @property
    def references(self) -> tuple[Reference, ...]:
        """The references this injection reads."""
        return self.appearance if self.shape is None else (*self.appearance, self.shape)

    @property
    def neutral(self) -> bool:
        """True if the injection cannot change anything: hosts then attach nothing at all."""
        return self.edit.strength == 0

    def at(self, appearance: bool, shape: bool, matches: bool = True) -> AttentionEdit | None:
        """The edit with only those references and matches that are at work; None if nothing is left to do."""
        edit = self.edit if matches else replace(self.edit, matched=0.0)
        if not appearance or not self.appearance:
            edit = replace(edit, reference="none", qk_stats=False, matched=0.0)
        if not shape or self.shape is None:
            edit = replace(edit, shape_query=0.0, shape_key=0.0)
        reads = edit.reference != "none" or edit.qk_stats or edit.matched > 0
        return edit if reads or edit.shape_query > 0 or edit.shape_key > 0 else None
