"""``python -m benchmarks.inversion.composed --json FILE``: learned, injected, and both, on the same crossed pairs.

Every judged shape is crossed with some of the judged appearances, and what `benchmarks.inversion` learned of each is
used: run that first. Measures are those of `benchmarks.quality`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from demo import comfy as comfy_host
from demo import world

comfy_host.ensure_importable()

from benchmarks.quality.__main__ import WORKFLOW, against, markdown, summary  # noqa: E402
from benchmarks.quality.measures import Judges, measure  # noqa: E402
from benchmarks.quality.methods import Method, Studio, injected, prompted  # noqa: E402
from benchmarks.quality.pairs import Pair  # noqa: E402
from benchmarks.quality.recolored import recolored  # noqa: E402
from inversion_core.presets import PRESETS  # noqa: E402

from .__main__ import Bench  # noqa: E402
from .concepts import TOKENS, Concept, concepts  # noqa: E402
from .tables import write_table  # noqa: E402

CROSSINGS = 4
"""Appearances that each shape is crossed with."""
SHOWN = 6


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


def crossed(number: int, tuning: bool) -> list[Crossed]:
    """Each of so many shapes with `CROSSINGS` of as many appearances."""
    shapes, looks = concepts("shape", number, tuning), concepts("appearance", number, tuning)
    return [
        Crossed(700_000 + 100 * i + k, shapes[i], looks[(i + k) % number])
        for i in range(number)
        for k in range(min(CROSSINGS, number))
    ]


def said(*kinds: str) -> Callable[[Pair], str]:
    """A prompt that says the learned words of these kinds, and plain ones in the others' place."""

    def words(pair: Pair) -> str:
        look = f"<{TOKENS['appearance']}> " if "appearance" in kinds else ""
        shape = f"<{TOKENS['shape']}>" if "shape" in kinds else "shape"
        return f"a {look}{shape} on {pair.a.background}"

    return words


@dataclass(frozen=True)
class Row:
    """A method with what it needs learned: by which method of `benchmarks.inversion`, of which kinds."""

    method: Method
    by: str = "ours"
    kinds: tuple[str, ...] = ()


def _alone(kinds: tuple[str, ...] = (), by: str = "ours") -> Row:
    """By words."""
    return Row(partial(prompted, said(*kinds)), by, kinds)


def _beside(kinds: tuple[str, ...] = (), by: str = "ours") -> Row:
    """Beside what the workflow *learned_and_injected* does: `default` on a shape of one colour, then Color Match."""
    made = partial(injected, PRESETS["default"], words=said(*kinds), shape="flat a")
    return Row(partial(recolored, made), by, kinds)


BOTH = ("shape", "appearance")
ROWS: dict[str, Row] = {
    "prompt only": _alone(),
    "textual inversion of both": _alone(BOTH, "textual inversion"),
    "learned both": _alone(BOTH),
    "default": Row(partial(injected, PRESETS["default"])),
    "default + learned shape": Row(partial(injected, PRESETS["default"], words=said("shape")), kinds=("shape",)),
    WORKFLOW: _beside(),
    "workflow + textual inversion of the shape": _beside(("shape",), "textual inversion"),
    "workflow + learned shape": _beside(("shape",)),
    "workflow + learned look": _beside(("appearance",)),
    "workflow + learned both": _beside(BOTH),
}
"""*workflow* is the best training-free combination (docs/findings.md): `default`, `flatten`, AdaIN Color Match."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inversion.composed", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--docs", type=Path, help="a page whose <!-- composed --> table is to be replaced")
    parser.add_argument("--sheet", type=Path, help="where to save some of the pictures as one image")
    parser.add_argument("--concepts", type=int, default=8, help="of each kind")
    parser.add_argument("--steps", type=int, default=200, help="of learning, as of benchmarks.inversion")
    parser.add_argument("--prompts", type=int, default=12, help="as of benchmarks.inversion")
    parser.add_argument("--tuning", action="store_true", help="the tuning concepts: values may be chosen on them")
    options = parser.parse_args()
    with torch.inference_mode():
        bench = Bench(options.steps, options.prompts, options.tuning)
        rows, sheet = composed(bench, crossed(options.concepts, options.tuning))
    led = against(against(rows, "outline_lead", "boundary_f", WORKFLOW), "look_lead", "appearance", WORKFLOW)
    table = summary(led)
    text = markdown(table, len(next(iter(rows.values()))))
    options.json.write_text(json.dumps({"pairs": len(sheet), "methods": table}, indent=2) + "\n", encoding="utf-8")
    if options.docs is not None:
        write_table("composed", text.rstrip("\n"), options.docs)
    if options.sheet is not None:
        every = max(1, len(sheet) // SHOWN)
        pixels = np.concatenate([np.concatenate(row, axis=1) for row in sheet[::every][:SHOWN]])
        Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8)).save(options.sheet, quality=90)
    print(text)


def composed(bench: Bench, pairs: list[Crossed]) -> tuple[dict[str, list[dict[str, float]]], list[list[np.ndarray]]]:
    """Figures of every row on every pair, and of every pair A, B, the true answer and the pictures."""
    judges = Judges.load()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ROWS}
    sheet = []
    for pair in tqdm(pairs, mininterval=5):
        shown = [pair.shape.image, pair.appearance.image, pair.truth.image]
        for name, row in ROWS.items():
            of = {"shape": pair.shape_of, "appearance": pair.look_of}
            studio = Studio(bench.applied(row.by, [of[kind] for kind in row.kinds]))
            result = row.method(studio, pair)
            figures = measure(result.picture, pair, judges)
            found[name].append({**figures, "rows": result.rows, "seconds": result.seconds})
            shown.append(result.picture.numpy())
        sheet.append(shown)
    return found, sheet


if __name__ == "__main__":
    main()
