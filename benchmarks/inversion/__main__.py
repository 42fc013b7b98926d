"""``python -m benchmarks.inversion --json FILE``: concepts learned from one picture each, ours beside others.

Results are kept as they come in `runs/inversion/`, so that an interrupted benchmark goes on where it stopped; they are
dropped when the demo model's weights or the code that learns and measures change. Seconds are of one thread's work, so
that what else the machine does matters little.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.fewer import fewest
from demo import comfy as comfy_host
from demo.weights import FOLDER
from inversion_core.learning.inversion import Kind

from .concepts import Concept, Newcomer, concepts, newcomers, together

if TYPE_CHECKING:
    from demo.model import DemoModel

ROOT = Path(__file__).resolve().parent.parent.parent
KINDS = ("shape", "appearance", "both", "joint")
LEARNING = ("augmentation", "lesson", "material", "objectives", "offset", "plan", "token", "trainer")
PAIRED = ("ours", "textual inversion", "dreambooth lora")
"""Methods of which a shape and an appearance, learned apart, go into one picture."""
ALWAYS = ("ours", "textual inversion")
"""What "others" are other than."""
SHOWN = 6
"""Pictures kept of each concept."""

Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inversion", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--docs", type=Path, help="a page whose tables are to be replaced")
    parser.add_argument("--sheet", type=Path, help="where to save pictures of ours as one image")
    parser.add_argument("--concepts", type=int, default=8, help="of each kind")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"some of {', '.join(KINDS)}, by commas")
    parser.add_argument("--methods", help="names by commas (default: all)")
    parser.add_argument(
        "--fewer",
        nargs="+",
        default=[],
        metavar="NAME=COUNT",
        help="methods for the first concepts only; 'others': all but ours and textual inversion",
    )
    parser.add_argument("--steps", type=int, default=200, help="of learning, the same for every method")
    parser.add_argument("--prompts", type=int, default=12, help="pictures for each concept")
    parser.add_argument("--tuning", action="store_true", help="the tuning concepts: values may be chosen on them")
    options = parser.parse_args()
    kinds = [kind.strip() for kind in options.kinds.split(",")]
    if not set(kinds) <= set(KINDS):
        parser.error(f"--kinds: there are {', '.join(KINDS)}")
    comfy_host.ensure_importable()
    with torch.inference_mode():
        bench = Bench(options.steps, options.prompts, options.tuning)
        figures = bench.run(
            kinds,
            options.methods,
            options.concepts,
            fewest(options.fewer, fewer()),
            lambda found: options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8"),
        )
    from .tables import tables, write_tables

    print("\n\n".join(tables(figures).values()))
    if options.docs is not None:
        write_tables(figures, options.docs)
    if options.sheet is not None:
        bench.sheet(kinds, options.concepts).save(options.sheet, quality=90)


class Bench:
    """Learns, draws, measures and keeps."""

    def __init__(self, steps: int, prompts: int, tuning: bool) -> None:
        from demo.judge import Judge
        from demo.model import load_demo_model

        self.steps, self.prompts, self.tuning = steps, prompts, tuning
        self.demo, self.judge = load_demo_model(), Judge.load()
        state = hashlib.sha256()
        files = [*sorted(FOLDER.glob("*.safetensors")), *sorted((ROOT / "demo").glob("*.py"))]
        files += [ROOT / "inversion_core" / "learning" / f"{name}.py" for name in LEARNING]
        files += [Path(__file__).with_name(f"{name}.py") for name in ("concepts", "joint", "measures", "methods")]
        for file in files:
            state.update(file.read_bytes())
        self.folder = ROOT / "runs" / "inversion" / state.hexdigest()[:12]
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(
        self,
        kinds: list[str],
        names: str | None,
        number: int,
        most: Mapping[str, int] | None = None,
        save: Callable[[dict[str, Any]], object] = lambda _: None,
    ) -> dict[str, Any]:
        """All figures asked for: kind -> method -> mean of each figure; saved after each round of concepts.

        Args:
            names: of methods, by commas; None: all.
            number: of concepts of each kind.
            most: by method, how many of them it is for, where that is less.
        """
        from .joint import WAYS
        from .methods import METHODS, chosen

        methods = chosen(list(METHODS) if names is None else [name.strip() for name in names.split(",")])
        pairs = [name for name in PAIRED if name in methods]
        figures: dict[str, Any] = {}
        for done in range(1, number + 1):
            figures = {"steps": self.steps, "prompts": self.prompts, "concepts": done}
            for kind in kinds:
                alone = [name for name, method in methods.items() if kind in method.kinds]
                which = {"both": pairs, "joint": WAYS}.get(kind, alone)
                rows = {name: self._rows(kind, name, min(done, (most or {}).get(name, done))) for name in which}
                figures[kind] = {name: mean_of(some) for name, some in rows.items()}
            save(figures)
        return figures

    def _rows(self, kind: str, name: str, number: int) -> list[Figures]:
        if kind == "both":
            return [self._both(name, index) for index in range(number)]
        if kind == "joint":
            return [self._joint(name, one) for one in newcomers(number, self.tuning)]
        return [self.alone(name, concept) for concept in concepts(kind, number, self.tuning)]  # pyright: ignore[reportArgumentType]

    def alone(self, name: str, concept: Any) -> Figures:
        """What a method learned of a concept, by prompts with its word; learned now if not before."""
        from inversion_core.learning.files import save_inversion

        from . import measures
        from .methods import METHODS, learned

        def make() -> tuple[Figures, Tensor]:
            begun = time.process_time()
            found = learned(METHODS[name], concept, self.steps, self.demo)
            seconds = time.process_time() - begun
            if found.inversion is not None:
                save_inversion(found.inversion, self._file(name, concept.kind, concept.seed, "safetensors"))
            wanted = concept.wanted(self.prompts)
            pictures = self._draw(found.demo, wanted)
            figure = measures.shape_figures if concept.kind == "shape" else measures.appearance_figures
            figures = figure(pictures, wanted, self.judge)
            print(
                concept.kind, concept.seed, name, {key: round(value, 2) for key, value in figures.items()}, flush=True
            )
            return {**figures, "seconds_per_step": seconds / found.steps, "steps": found.steps}, pictures

        return self._kept(self._file(name, concept.kind, concept.seed, "npz"), make)

    def _both(self, name: str, index: int) -> Figures:
        """Shape and appearance of two concepts, learned apart, in one picture."""
        from . import measures
        from .methods import BESIDE

        pair = [concepts(kind, index + 1, self.tuning)[index] for kind in ("shape", "appearance")]

        def make() -> tuple[Figures, Tensor]:
            wanted = together(pair[0], pair[1], self.prompts)
            pictures = self._draw(self.applied(name, pair), wanted)
            return measures.appearance_figures(pictures, wanted, self.judge), pictures

        return self._kept(self._file(name, f"both-{BESIDE}", pair[0].seed, "npz"), make)

    def applied(self, name: str, learned: Sequence[Concept]) -> DemoModel:
        """The demo model with what a method learned of some concepts, now if not before; an appearance beside a shape
        by `BESIDE`."""
        from inversion_core.learning.files import load_inversion

        from .methods import applied

        for concept in learned:
            self.alone(name, concept)
        files = [self._file(name, concept.kind, concept.seed, "safetensors") for concept in learned]
        return applied(self.demo, [load_inversion(file) for file in files])

    def state(self, name: str, kinds: Sequence[str]) -> str:
        """What tells a method's inversions of these kinds from those of other code or other plans."""
        return " ".join([self.folder.name, *(self._file(name, kind, 0, "").stem for kind in kinds)])

    def _joint(self, way: str, newcomer: Newcomer) -> Figures:
        """Shape and appearance of one picture."""
        from . import measures
        from .joint import learned_both

        def make() -> tuple[Figures, Tensor]:
            demo = learned_both(way, newcomer, self.steps, self.demo)
            prompts = newcomer.wanted("shape", self.prompts)
            figures = measures.shape_figures(self._draw(demo, prompts), prompts, self.judge)
            found = {key: figures[key] for key in ("shape_present", "prompt_obeyed")}
            prompts = newcomer.wanted("appearance", self.prompts)
            figures = measures.appearance_figures(self._draw(demo, prompts), prompts, self.judge)
            found |= {key: figures[key] for key in ("appearance", "shape_obeyed")}
            prompts = newcomer.wanted_together(self.prompts)
            pictures = self._draw(demo, prompts)
            figures = measures.appearance_figures(pictures, prompts, self.judge)
            found |= {f"both_{key}": figures[key] for key in ("appearance", "shape_obeyed")}
            print("joint", newcomer.seed, way, {key: round(value, 2) for key, value in found.items()}, flush=True)
            return found, pictures

        return self._kept(self._file(way, "joint", newcomer.seed, "npz"), make)

    def _draw(self, demo: Any, wanted: list) -> Tensor:
        from demo.generate import generate

        return generate(demo, [one.prompt for one in wanted], [one.seed for one in wanted])

    def _file(self, name: str, kind: str, seed: int, ending: str) -> Path:
        from .methods import METHODS

        # The plans themselves, so that another recipe for the one kind leaves the other's results.
        method = METHODS.get(name, METHODS["ours"])
        kinds: list[Kind] = [one for one in get_args(Kind) if kind == one or kind not in get_args(Kind)]
        plans = [method.plan(one, self.steps) for one in kinds]
        which = hashlib.sha256(f"{name} {plans} {self.prompts}".encode()).hexdigest()[:8]
        return self.folder / f"{kind}-{seed}-{which}.{ending}"

    def _kept(self, file: Path, make: Callable[[], tuple[Figures, Tensor]]) -> Figures:
        if not file.is_file():
            figures, pictures = make()
            pixels = (pictures[:SHOWN].clamp(0, 1) * 255).round().byte().numpy()
            partial = file.with_name(f"partial-{file.name}")
            np.savez_compressed(partial, figures=np.array(json.dumps(figures)), pictures=pixels)
            partial.replace(file)
        with np.load(file) as found:
            return json.loads(str(found["figures"]))

    def sheet(self, kinds: list[str], number: int) -> Image.Image:
        """Each concept's picture and what ours made of it."""
        from demo import world

        from .methods import BESIDE

        rows = []
        for kind in kinds:
            for index in range(number):
                if kind == "joint":
                    continue
                pair = [concepts(one, index + 1, self.tuning)[index] for one in ("shape", "appearance")]
                shown = pair if kind == "both" else [one for one in pair if one.kind == kind]
                sources = [(world.render(one.factors).image * 255).round().astype(np.uint8) for one in shown]
                sources += [np.full_like(sources[0], 255)] * (2 - len(sources))
                kept = f"both-{BESIDE}" if kind == "both" else kind
                with np.load(self._file("ours", kept, shown[0].seed, "npz")) as found:
                    rows.append(np.concatenate([*sources, *found["pictures"]], axis=1))
        return Image.fromarray(np.concatenate(rows))


def mean_of(rows: list[Figures]) -> Figures:
    """The mean of each figure, and of how many concepts."""
    return {"concepts": len(rows), **{key: float(np.mean([row[key] for row in rows])) for key in rows[0]}}


def fewer() -> dict[str, list[str]]:
    """What ``--fewer`` may name."""
    from .joint import WAYS
    from .methods import METHODS

    every = (*METHODS, *WAYS)
    return {**{name: [name] for name in every}, "others": [name for name in every if name not in ALWAYS]}


if __name__ == "__main__":
    main()
