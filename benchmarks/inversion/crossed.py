"""Shapes crossed with appearances, and the rows of ``benchmarks.inversion.composed``: learned, injected, and both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from tqdm import tqdm

from demo import comfy as comfy_host
from demo import world

comfy_host.ensure_importable()

from benchmarks.quality.__main__ import WORKFLOW  # noqa: E402
from benchmarks.quality.groups import shape_until  # noqa: E402
from benchmarks.quality.kept import Kept  # noqa: E402
from benchmarks.quality.measures import Judges, measure  # noqa: E402
from benchmarks.quality.methods import Method, Result, Studio, described, injected, prompted  # noqa: E402
from benchmarks.quality.methods import crossed as read_by_features  # noqa: E402
from benchmarks.quality.pairs import Pair  # noqa: E402
from benchmarks.quality.recolored import recolored  # noqa: E402
from inversion_core.presets import PRESETS, Preset  # noqa: E402

from .__main__ import Bench, Figures, mean_of  # noqa: E402
from .concepts import TOKENS, TUNING_SEED, Concept  # noqa: E402

FIRST_SEED = 430_000
"""Judged concepts, which neither this benchmark nor `benchmarks.inversion` has seen before."""
LOOKS = len(world.COLOURS)
"""Appearances: one of each colour."""
CROSSINGS = 4
"""Appearances that each shape is crossed with."""


@dataclass(frozen=True)
class Crossed(Pair):
    """A pair of two concepts: the shape's picture as A, the appearance's as B."""

    shape_of: Concept
    look_of: Concept

    @cached_property
    def a(self) -> world.Factors:
        """Whose shape and place."""
        return self.shape_of.factors

    @cached_property
    def b(self) -> world.Factors:
        """Whose appearance."""
        return self.look_of.factors


def crossed(shapes: int, tuning: bool) -> list[Crossed]:
    """So many shapes, each with `CROSSINGS` appearances."""
    first, noise = (TUNING_SEED, 700_000) if tuning else (FIRST_SEED, 720_000)
    return [
        Crossed(
            noise + 100 * shape + k,
            Concept("shape", first + shape),
            Concept("appearance", first + (3 * shape + k) % LOOKS),
        )
        for shape in range(shapes)
        for k in range(CROSSINGS)
    ]


def said(*kinds: str) -> Callable[[Pair], str]:
    """A prompt that says the learned words of these kinds, and plain ones in the others' place."""
    return partial(_said, kinds)


def _said(kinds: Sequence[str], pair: Pair) -> str:
    look = f"<{TOKENS['appearance']}> " if "appearance" in kinds else ""
    shape = f"<{TOKENS['shape']}>" if "shape" in kinds else "shape"
    return f"a {look}{shape} on {pair.a.background}"


@dataclass(frozen=True)
class Row:
    """A method with what it needs learned: by which method of `benchmarks.inversion`, of which kinds."""

    method: Method
    by: str = "ours"
    kinds: tuple[str, ...] = ()


def _alone(kinds: tuple[str, ...] = (), by: str = "ours") -> Row:
    """By words."""
    return Row(partial(prompted, said(*kinds)), by, kinds)


def _workflow(words: Callable[[Pair], str], preset: Preset = PRESETS["default"]) -> Method:
    """The best training-free combination (docs/findings.md): `default` on a shape of one colour, then Color Match."""
    return partial(recolored, partial(injected, preset, words=words, shape="flat a"))


def _beside(kinds: tuple[str, ...] = (), by: str = "ours", preset: Preset = PRESETS["default"]) -> Row:
    """Beside what the workflow *learned_and_injected* does."""
    return Row(_workflow(said(*kinds), preset), by, kinds)


def _featured(words: Callable[[Pair], str]) -> Method:
    """Cross-Feature Attention throughout, and all else as in the workflow."""
    return partial(recolored, partial(read_by_features, PRESETS["default"], end=1.0, shape="flat a", words=words))


SHAPE, BOTH = ("shape",), ("shape", "appearance")
PLACED = "ours: as pictured"
LOOSER = shape_until(0.8, PRESETS["default"])
"""Lets the shape go for the last fifth of the sampling."""
ROWS: dict[str, Row] = {
    "prompt only": _alone(),
    "textual inversion of both": _alone(BOTH, "textual inversion"),
    "learned both": _alone(BOTH),
    WORKFLOW: _beside(),
    "workflow, full prompt": Row(_workflow(described)),
    "workflow + textual inversion of the shape": _beside(SHAPE, "textual inversion"),
    "workflow + learned shape": _beside(SHAPE),
    "workflow + shape learned as pictured": _beside(SHAPE, PLACED),
    "workflow, shape until 80 %": _beside(preset=LOOSER),
    "workflow, shape until 80 % + shape learned as pictured": _beside(SHAPE, PLACED, LOOSER),
    "cross-feature": Row(_featured(said())),
    "cross-feature + shape learned as pictured": Row(_featured(said(*SHAPE)), PLACED, SHAPE),
    "workflow + learned look": _beside(("appearance",)),
    "workflow + learned both": _beside(BOTH),
}


def composed(bench: Bench, pairs: Sequence[Crossed]) -> tuple[dict[str, list[Figures]], list[list[np.ndarray]]]:
    """Figures of every row on every pair, and of every pair A, B, the true answer and the pictures."""
    judges = Judges.load()
    methods = {name: partial(_drawn, row.method, bench.state(row.by, row.kinds)) for name, row in ROWS.items()}
    kept = Kept(bench.folder / "composed", methods, "UNet")
    found: dict[str, list[Figures]] = {name: [] for name in ROWS}
    sheet = []
    for pair in tqdm(pairs, mininterval=5):
        shown = [pair.shape.image, pair.appearance.image, pair.truth.image]
        for name, row in ROWS.items():
            result = kept.result(name, pair.seed)
            if result is None:
                of = {"shape": pair.shape_of, "appearance": pair.look_of}
                studio = Studio(bench.applied(row.by, [of[kind] for kind in row.kinds]))
                result = kept.add(name, pair.seed, methods[name](studio, pair))
            figures = kept.figures(name, pair.seed)
            if figures is None:
                figures = kept.add_figures(name, pair.seed, measure(result.picture, pair, judges))
            found[name].append({**figures, "rows": result.rows, "seconds": result.seconds})
            shown.append(result.picture.numpy())
        sheet.append(shown)
    return found, sheet


def _drawn(method: Method, learned: str, studio: Studio, pair: Pair) -> Result:
    """A row's picture; `learned` says what it was made with, so that `Kept` tells it from others."""
    return method(studio, pair)


def by_words(bench: Bench, pairs: Sequence[Crossed]) -> dict[str, Figures]:
    """What each way to learn made of these shapes, by prompts with its word."""
    shapes = {pair.shape_of.seed: pair.shape_of for pair in pairs}.values()
    ways = dict.fromkeys(row.by for row in ROWS.values() if "shape" in row.kinds)
    return {way: mean_of([bench.alone(way, shape) for shape in shapes]) for way in ways}


def by_shape(figures: Sequence[Figures], pairs: Sequence[Crossed]) -> list[Figures]:
    """The mean figures of each shape's pairs."""
    of: dict[int, list[Figures]] = {}
    for one, pair in zip(figures, pairs, strict=True):
        of.setdefault(pair.shape_of.seed, []).append(one)
    return [{key: float(np.mean([one[key] for one in some])) for key in some[0]} for some in of.values()]
