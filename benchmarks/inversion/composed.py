"""``python -m benchmarks.inversion.composed --json FILE``: learned, injected, and both, on the same crossed pairs.

Every shape is crossed with some of the appearances. What of them is not learned yet, is; measures are those of
`benchmarks.quality`. Intervals are over shapes: one more appearance on the same shape is hardly new evidence about an
outline. Pictures and inversions are kept in `runs/inversion/`, so an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.quality.__main__ import WORKFLOW, against, markdown, summary

from .__main__ import Bench
from .crossed import by_shape, by_words, composed, crossed
from .tables import table_of, write_table

SHOWN = 6


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inversion.composed", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--docs", type=Path, help="a page whose <!-- composed --> table is to be replaced")
    parser.add_argument("--sheet", type=Path, help="where to save some of the pictures as one image")
    parser.add_argument("--shapes", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200, help="of learning, as of benchmarks.inversion")
    parser.add_argument("--prompts", type=int, default=12, help="as of benchmarks.inversion")
    parser.add_argument("--tuning", action="store_true", help="the tuning concepts: values may be chosen on them")
    options = parser.parse_args()
    pairs = crossed(options.shapes, options.tuning)
    with torch.inference_mode():
        bench = Bench(options.steps, options.prompts, options.tuning)
        rows, sheet = composed(bench, pairs)
        alone = by_words(bench, pairs)
    led = against(against(rows, "outline_lead", "boundary_f", WORKFLOW), "look_lead", "appearance", WORKFLOW)
    table = summary({name: by_shape(figures, pairs) for name, figures in led.items()})
    for row in table.values():
        row["pairs"] = len(pairs)
    text = markdown(table, len(pairs))
    found = {"pairs": len(pairs), "shapes": options.shapes, "methods": table, "alone": alone}
    options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if options.docs is not None:
        write_table("composed", text.rstrip("\n"), options.docs)
        write_table("alone", table_of("shape", alone), options.docs)
    if options.sheet is not None:
        every = max(1, len(sheet) // SHOWN)
        pixels = np.concatenate([np.concatenate(row, axis=1) for row in sheet[::every][:SHOWN]])
        Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8)).save(options.sheet, quality=90)
    print(text + "\n" + table_of("shape", alone))


if __name__ == "__main__":
    main()
