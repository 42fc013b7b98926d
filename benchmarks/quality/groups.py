"""What `--only` chooses among: the methods with the values that are judged, or that values were chosen among.

A row that needs a training first belongs into a group of its own, made by functions of a module of its own, and may be
given fewer pairs (``--fewer NAME=COUNT``).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from inversion_core.color import Space
from inversion_core.presets import PRESETS, Preset
from inversion_core.statistics import Method as Transport

from .methods import Method, autoencoded, colored, crossed, described, injected, neutral, placed, prompted, shown
from .one_query import read_by_cls
from .recolored import recolored


def shape_until(end: float, preset: Preset) -> Preset:
    """The preset, but that it lets the shape go at this sampling percent at the latest."""
    return replace(
        preset, steps=tuple(replace(step, shape_window=step.shape_window.until(end)) for step in preset.steps)
    )


BASELINES: dict[str, Method] = {
    "A itself": partial(shown, "shape"),
    "B itself": partial(shown, "appearance"),
    "true answer through the autoencoder": autoencoded,
    "prompt only": partial(prompted, neutral),
    "full prompt (cap of the words)": partial(prompted, described),
    **{f"img2img {share}": partial(prompted, described, denoise=share) for share in (0.4, 0.6, 0.8)},
}
ATTENTION: dict[str, Method] = {
    **{name: partial(injected, preset) for name, preset in PRESETS.items()},
    "cross-feature": partial(crossed, PRESETS["default"]),
    "cross-feature, throughout": partial(crossed, PRESETS["default"], end=1.0),
}
OURS: dict[str, Method] = {
    "default + flat shape": partial(injected, PRESETS["default"], shape="flat a"),
    "default + flat shape + full prompt": partial(injected, PRESETS["default"], shape="flat a", words=described),
    "default + full prompt": partial(injected, PRESETS["default"], words=described),
    "default - colour": partial(injected, PRESETS["default"], color=0.0),
    "default - shape": partial(injected, PRESETS["default"], shape=None),
    "colour guidance alone": colored,
}

RECOLORED: dict[str, Method] = {
    f"{name} + colour match": partial(recolored, {**BASELINES, **ATTENTION, **OURS}[name])
    for name in (
        "A itself",
        "prompt only",
        "default",
        "default + flat shape",
        "default + flat shape + full prompt",
        "cross-image",
        "cross-feature, throughout",
    )
}
"""AdaIN Color Match of the finished picture besides. The first two tell what it does alone."""

ONE_QUERY: dict[str, Method] = {
    "read by B's CLS": partial(read_by_cls, PRESETS["default"]),
    "read by B's CLS, first half": partial(read_by_cls, PRESETS["default"], end=0.5),
    "read by B's CLS - colour": partial(read_by_cls, PRESETS["default"], color=False),
}
"""Idea 4."""

ROOM, FEATHER = 4, 4
"""Of the mask around what is placed, as in workflows/place_on_picture."""
PLACED: dict[str, Method] = {
    f"{name} on C": partial(placed, PRESETS[name], room=ROOM, feather=FEATHER) for name in ("default", "cross-image")
}
"""A on C with B's appearance."""
PLACED |= {f"{name} + colour match": partial(recolored, method) for name, method in PLACED.items()}

PRESET_PAGE: dict[str, Method] = {
    "prompt only": BASELINES["prompt only"],
    **ATTENTION,
    "default + flat shape": OURS["default + flat shape"],
}

UNET_ONLY = {name for name, preset in PRESETS.items() if not any(step.blocks for step in preset.steps)}
"""Presets that have no form for a diffusion transformer."""

SHAPE_ENDS = (0.8, 0.9, 1.0)
"""What the shape's end was chosen among, on tuning pairs (docs/presets.md)."""
SHAPE_END: dict[str, Method] = {
    **{f"shape until {end:.0%}": partial(injected, shape_until(end, PRESETS["default"])) for end in SHAPE_ENDS},
    **{
        f"flat shape until {end:.0%}": partial(injected, shape_until(end, PRESETS["default"]), shape="flat a")
        for end in SHAPE_ENDS
    },
    **{
        f"cross-feature, shape until {end:.0%}": partial(crossed, PRESETS["default"], shape_end=end)
        for end in SHAPE_ENDS
    },
}

DIT_PAGE: dict[str, Method] = {
    "prompt only": BASELINES["prompt only"],
    "default": ATTENTION["default"],
    "default - colour": OURS["default - colour"],
    "masactrl": ATTENTION["masactrl"],
    "style-aligned": ATTENTION["style-aligned"],
}

MATCHES: tuple[tuple[Transport, Space], ...] = (
    ("mkl", "lab"),
    ("mkl", "linear_rgb"),
    ("histogram", "linear_rgb"),
    ("sliced_ot", "lab"),
    ("sliced_ot", "linear_rgb"),
)
COLOR_MATCH: dict[str, Method] = {"default + flat shape": OURS["default + flat shape"]} | {
    f"default + flat shape + {method} {space}": partial(
        recolored, OURS["default + flat shape"], method=method, space=space
    )
    for method, space in MATCHES
}
"""What the match at the end of the workflows was chosen among, on tuning pairs (docs/findings.md)."""

FEATURE_END: dict[str, Method] = {
    "default + flat shape + colour match": RECOLORED["default + flat shape + colour match"],
    **{
        f"cross-feature until {end:.0%}, {shape} + colour match": partial(
            recolored, partial(crossed, PRESETS["default"], end=end, shape=shape)
        )
        for end in (0.5, 1.0)
        for shape in ("a", "flat a")
    },
}
"""What Cross-Feature Attention's window and shape were chosen among, on tuning pairs (docs/features.md)."""

PLACING: dict[str, Method] = {
    f"room {room} feather {feather} on C": partial(placed, PRESETS["default"], room=room, feather=feather)
    for room, feather in ((4, 4), (2, 4), (2, 2), (1, 2), (0, 2))
}
"""What the mask's room and feather were chosen among, on tuning pairs (docs/findings.md)."""

ON_C = {*PLACED, *PLACING}
"""What is measured against the true composition on C."""

GROUPS: dict[str, dict[str, Method]] = {
    "baselines": BASELINES,
    "attention": ATTENTION,
    "ours": OURS,
    "recoloured": RECOLORED,
    "one query": ONE_QUERY,
    "placed": PLACED,
    "presets": PRESET_PAGE,
    "dit": DIT_PAGE,
    "shape end": SHAPE_END,
    "placing": PLACING,
    "colour match": COLOR_MATCH,
    "feature end": FEATURE_END,
}
"""What `--only` chooses among."""

TABLE = ("baselines", "attention", "ours", "recoloured", "placed")
"""The groups of the table in docs/findings.md, and what is made where nothing is asked for."""
