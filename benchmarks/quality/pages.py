"""``python -m benchmarks.quality.pages``: the two pages of the contact sheet that the README shows.

The first judged pairs, none left out: seven on the first page, the next seven on the second. Pictures that the
benchmark has made are taken from `runs/quality/`, others are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from demo import comfy as comfy_host
from demo.files import replace_file

from .sheets import sheet

ROOT = Path(__file__).resolve().parent.parent.parent
IMAGES = ROOT / "docs" / "images"
ROWS = 7


@dataclass(frozen=True)
class Page:
    """What is shown, by title.

    Attributes:
        given: what the methods were given, and the true answer: attributes of `Pair`.
        methods: by their names in `groups`.
        first: the first of its pairs, counted from the first judged one.
    """

    given: dict[str, str]
    methods: dict[str, str]
    first: int


PAGES = {
    "composition": Page(
        {"A: shape": "shape", "B: appearance": "appearance", "true answer": "truth"},
        {
            "words alone": "prompt only",
            "img2img of A,\nB in words": "img2img 0.6",
            "MasaCtrl": "masactrl",
            "StyleID": "style-id",
            "Cross-Image\nAttention": "cross-image",
            "KV Injection:\ndefault": "default",
            "the workflow:\n+ Color Match": "default + flat shape + colour match",
        },
        0,
    ),
    "placed": Page(
        {"A: shape": "shape", "B: appearance": "appearance", "C: place": "place", "true answer": "placed_truth"},
        {
            "Cross-Image\nAttention": "cross-image on C",
            "KV Injection:\ndefault": "default on C",
            "the workflow:\n+ Color Match": "default on C + colour match",
        },
        ROWS,
    ),
}
"""By the end of their files' names."""


def main() -> None:
    comfy_host.ensure_importable()
    from demo.model import load_demo_model

    from .groups import GROUPS
    from .kept import Kept
    from .methods import Studio
    from .pairs import pairs

    everything = {name: method for group in GROUPS.values() for name, method in group.items()}
    for ending, page in PAGES.items():
        methods = {name: everything[name] for name in page.methods.values()}
        kept = Kept(ROOT / "runs" / "quality", methods, "UNet")
        rows: list[list[np.ndarray]] = []
        with torch.inference_mode():
            studio = Studio(load_demo_model(network="UNet"))
            for pair in tqdm(pairs(page.first + ROWS, tuning=False)[page.first :], desc=ending, mininterval=5):
                for name, method in methods.items():
                    if kept.result(name, pair.seed) is None:
                        kept.add(name, pair.seed, method(studio, pair))
                given = [_pixels(getattr(pair, one)) for one in page.given.values()]
                rows.append([*given, *(kept.picture(name, pair.seed).numpy() for name in methods)])
        made = sheet([*page.given, *page.methods], rows)
        file = IMAGES / f"sheet-{ending}.jpg"
        replace_file(file, lambda path, made=made: made.save(path, "JPEG", quality=90))
        print(file.relative_to(ROOT), flush=True)


def _pixels(given: Any) -> np.ndarray:
    """Of a rendered picture, or of a place, which is an array already."""
    return given if isinstance(given, np.ndarray) else given.image


if __name__ == "__main__":
    main()
