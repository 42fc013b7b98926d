"""``python -m benchmarks.quality --json FILE``: every method on withheld pairs of the demo world.

Results are kept as they come in `runs/quality/`, so that an interrupted benchmark goes on where it stopped and more
pairs can be added later. A picture is made anew only when its method, the code that this can reach or the weights it
loads have changed, and measured anew when the measures have (see `state`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.fewer import fewest
from demo import comfy as comfy_host

from .sheets import sheet
from .state import NETWORKS

ROOT = Path(__file__).resolve().parent.parent.parent
NOTHING = "prompt only"
"""Where this method is among them, every other's gain in appearance over it is given, pair by pair."""
DEFAULT = "default"
"""Where this method is among them, so is every other's lead over it, pair by pair."""
WORKFLOW = "workflow"
"""As in `benchmarks.inversion.composed`; where it is among them, the others' leads over it."""
SHEET_PAIRS = 8
COMPARED = {
    "gain": f"appearance less that of {NOTHING!r} on the same pair",
    "lead": f"harmonic less that of {DEFAULT!r} on the same pair",
    "outline_lead": f"boundary_f less that of {WORKFLOW!r} on the same pair",
    "look_lead": f"appearance less that of {WORKFLOW!r} on the same pair",
}
_TABLE = ("<!-- table -->", "<!-- /table -->")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    parser.add_argument("--docs", type=Path, help="a page whose <!-- table --> is to be replaced")
    parser.add_argument("--sheet", type=Path, help="where to save the first pairs' pictures as one image")
    parser.add_argument("--only", help="groups or methods, by commas (default: those of the table)")
    parser.add_argument(
        "--network", nargs="+", choices=[*NETWORKS], default=["UNet"], help="which of the demo's models"
    )
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument(
        "--fewer", nargs="+", default=[], metavar="NAME=COUNT", help="groups or methods for the first pairs only"
    )
    parser.add_argument("--tuning", action="store_true", help="the tuning pairs instead: values may be chosen on them")
    options = parser.parse_args()
    comfy_host.ensure_importable()
    from demo.model import load_demo_model

    from .groups import ON_C
    from .kept import Kept
    from .measures import Judges, measure
    from .methods import Studio
    from .pairs import pairs

    tasks = pairs(options.pairs, options.tuning)
    results: dict[str, list[dict[str, float]]] = {}
    made: dict[str, list[np.ndarray]] = {}
    judges = Judges.load()
    for network in options.network:
        chosen = _methods(options.only, network)
        most = fewest(options.fewer, fewer())
        kept = Kept(ROOT / "runs" / "quality", chosen, network)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
        with torch.inference_mode():
            studio = Studio(load_demo_model(network=network))
            for index, pair in enumerate(tqdm(tasks, desc=network, mininterval=5)):
                for name, method in chosen.items():
                    if index >= most.get(name, len(tasks)):
                        continue
                    result = kept.result(name, pair.seed)
                    if result is None:
                        result = kept.add(name, pair.seed, method(studio, pair))
                    figures = kept.figures(name, pair.seed)
                    if figures is None:
                        figures = measure(result.picture, pair, judges, placed=name in ON_C)
                        kept.add_figures(name, pair.seed, figures)
                    told = {"rows": result.rows, "seconds": result.seconds}
                    found[name].append({**figures, **told, **_untouched(result)})
        prefix = "" if len(options.network) == 1 else f"{network}: "
        compared = against(against(found, "gain", "appearance", NOTHING), "lead", "harmonic", DEFAULT)
        results |= {prefix + name: rows for name, rows in compared.items()}
        for name in chosen:
            shown = tasks[: min(SHEET_PAIRS, len(found[name]))]
            made[prefix + name] = [kept.picture(name, pair.seed).numpy() for pair in shown]
    table = summary(results)
    if options.json is not None:
        options.json.write_text(json.dumps({"pairs": len(tasks), "methods": table}, indent=2) + "\n", encoding="utf-8")
    if options.markdown is not None:
        options.markdown.write_text(markdown(table, len(tasks)), encoding="utf-8")
    if options.docs is not None:
        page = options.docs.read_text(encoding="utf-8")
        before, rest = page.split(_TABLE[0], 1)
        after = rest.split(_TABLE[1], 1)[1]
        table_text = markdown(table, len(tasks))
        options.docs.write_text(f"{before}{_TABLE[0]}\n{table_text}{_TABLE[1]}{after}", encoding="utf-8")
    if options.sheet is not None:
        rows = [
            [pair.shape.image, pair.appearance.image, pair.truth.image, *pictures]
            for pair, *pictures in zip(tasks, *made.values(), strict=False)
        ]
        sheet(["A: shape", "B: appearance", "true answer", *made], rows).save(options.sheet)
    print(markdown(table, len(tasks)))


def against(
    results: dict[str, list[dict[str, float]]], name: str, measure: str, other: str
) -> dict[str, list[dict[str, float]]]:
    """The rows with what they have more of a measure than the method `other` on the same pair, if that is among them.

    What was placed on C has another true answer, and is not compared.
    """
    from .groups import ON_C

    base = [row[measure] for row in results.get(other, [])]
    return {
        method: [{**row, name: row[measure] - less} for row, less in zip(rows, base, strict=False)]
        if base and method not in ON_C
        else rows
        for method, rows in results.items()
    }


def fewer() -> dict[str, list[str]]:
    """What ``--fewer`` may name: groups, and methods."""
    from .groups import GROUPS

    return {
        **{method: [method] for group in GROUPS.values() for method in group},
        **{k: [*v] for k, v in GROUPS.items()},
    }


def _methods(only: str | None, network: str) -> dict[str, Any]:
    from .groups import GROUPS, TABLE, UNET_ONLY

    everything = {name: method for group in GROUPS.values() for name, method in group.items()}
    chosen = _wanted(only or ",".join(TABLE), everything, GROUPS)
    return {name: method for name, method in chosen.items() if network == "UNet" or name not in UNET_ONLY}


def _wanted(only: str, everything: dict[str, Any], groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for word in (part.strip() for part in only.split(",")):
        if word not in groups and word not in everything:
            raise SystemExit(
                f"--only: {word!r} is no group ({', '.join(groups)}) and no method: {', '.join(everything)}"
            )
        chosen |= groups[word] if word in groups else {word: everything[word]}
    return chosen


def _untouched(result: Any) -> dict[str, float]:
    return {} if result.untouched is None else {"untouched": result.untouched}


def summary(results: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Mean and 95 % interval of every measure of every method, and on how many pairs."""
    from .measures import interval

    table: dict[str, dict[str, float]] = {}
    for name, rows in results.items():
        table[name] = {"pairs": len(rows)}
        for key in rows[0]:
            mean, low, high = interval([row[key] for row in rows])
            table[name] |= {key: mean, f"{key}_low": low, f"{key}_high": high}
    return table


def markdown(table: dict[str, dict[str, float]], pairs: int) -> str:
    """The table for people: mean, and half the width of its 95 % interval."""
    from .measures import MEASURES

    compared = [key for key in COMPARED if any(key in row for row in table.values())]
    untouched = ["untouched"] if any("untouched" in row for row in table.values()) else []
    fewer = ["pairs"] if any(row["pairs"] != pairs for row in table.values()) else []
    columns = [*fewer, *MEASURES, *compared, *untouched, "rows", "seconds"]
    lines = [f"| method ({pairs} pairs) | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name, row in table.items():
        cells = []
        for key in columns:
            if key not in row:
                cells.append("")
                continue
            if key == "pairs":
                cells.append(f"{row[key]:.0f}")
                continue
            half = (row[f"{key}_high"] - row[f"{key}_low"]) / 2
            digits = 0 if key == "rows" else 1 if key in ("seconds", "colour_delta_e") else 3 if "layout" in key else 2
            cells.append(f"{row[key]:.{digits}f}" + (f" ±{half:.{digits}f}" if half >= 0.5 * 10**-digits else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- `{name}`: {meaning}" for name, meaning in MEASURES.items())]
    lines += [f"- `{key}`: {COMPARED[key]}" for key in compared]
    lines += [
        "- `untouched`: share of the pixels outside the feathered mask that are C's, bit for bit" for _ in untouched
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
