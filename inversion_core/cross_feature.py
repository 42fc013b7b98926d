"""Cross-Feature Attention: what each part of the output reads of a reference is decided by features, not by queries.

Cross-Image Attention (arXiv 2311.03335) asks the model's own noisy queries and keys which part of B belongs to which
part of A. A self-supervised ViT answers the same question from the clean pictures, once for all noise levels; the
values are still the model's own, of the appearance reference's hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from torch import Tensor

from .attention import AttentionEdit
from .correspondence import Correspondence, CorrespondenceBank, Matching
from .features import Features
from .injection import Injection, Refresh, Window
from .reference import Reference

See = Callable[[Tensor], Features]
"""An extractor with its settings: a picture (1, 3, H, W) in [0, 1] -> its features."""
Rest = Literal["queries", "own"]

SHAPE_WINDOW = Window()
"""When the shape's queries and decoder features are at work, as in the preset `default`."""


def matches(
    see: See, shape: Reference, appearance: Sequence[Reference], matching: Matching, bank: CorrespondenceBank
) -> tuple[Correspondence, ...]:
    """Where each part of the shape's picture is found in each appearance reference's.

    Args:
        see: the features, those of the bank's earlier pairs too.
        shape: whose layout the output has; its mask says what of it counts.
        appearance: what is read, where their masks allow it.
        matching: how.
        bank: remembers pairs by content.

    Raises:
        ValueError: a reference without its picture.
    """
    return tuple(
        bank.get(see(_picture(shape, "shape")), see(_picture(one, "appearance")), matching, shape.mask, one.mask)
        for one in appearance
    )


def cross_feature(
    appearance: Sequence[Reference],
    shape: Reference,
    found: tuple[Correspondence, ...],
    *,
    strength: float = 1.0,
    share: float = 1.0,
    rest: Rest = "queries",
    window: Window,
    sites: str = "all",
    shape_strength: float = 1.0,
    mask: Tensor | None = None,
    refresh: Refresh | None = None,
) -> Injection:
    """The injection of Cross-Feature Attention.

    Args:
        appearance: whose appearance is taken; at least one.
        shape: whose layout is kept.
        found: where each part of the shape is in each appearance reference, from `matches`.
        strength: 0 to 1, of everything; 0 is the untouched model.
        share: 0 to 1, how much of the reading is decided by features inside the window.
        rest: what the rest reads, and all of it outside the window: `queries`, the appearance by the model's queries
            and keys, as the preset `default`; `own`, the picture itself, as without any injection.
        window: when features decide.
        sites: which self-attentions, as rules of `sites.select`.
        shape_strength: 0 to 1, how closely the layout follows the shape reference besides.
        mask: (1, 1, h, w), where the output is edited.
        refresh: when the output is looked at again, for a shape that moves; None: never.

    Raises:
        ValueError: a value out of range or unknown, no appearance reference, not one match for each.
    """
    if rest not in get_args(Rest):
        raise ValueError(f"rest is {rest!r}, allowed are {', '.join(get_args(Rest))}")
    edit = AttentionEdit(
        "replace" if rest == "queries" else "none", shape_query=shape_strength, matched=share, strength=strength
    )
    return Injection(
        edit,
        tuple(appearance),
        window=Window() if rest == "queries" else window,
        sites=sites,
        shape=shape,
        shape_window=SHAPE_WINDOW,
        feature_strength=shape_strength,
        matches=found,
        match_window=window,
        refresh=refresh,
        mask=mask,
    )


def _picture(reference: Reference, role: str) -> Tensor:
    if reference.picture is None:
        raise ValueError(
            f"the {role} reference does not hold its picture, which the features are to see: encode it anew"
        )
    return reference.picture
