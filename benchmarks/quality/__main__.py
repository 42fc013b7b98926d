"""``python -m benchmarks.quality --json FILE``: every method on withheld pairs of the demo world.

Results are kept as they come in `runs/quality/`, so that an interrupted benchmark goes on where it stopped; they are
dropped when the demo model's weights or the pack's code change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from demo import comfy as comfy_host
from demo.weights import DENOISER, DIT, FOLDER

ROOT = Path(__file__).resolve().parent.parent.parent
NETWORKS = ("UNet", "DiT")
NOTHING = "prompt only"
"""Where this method is among them, every other's gain in appearance over it is given, pair by pair."""
SHEET_PAIRS = 8
_PANEL = 128
_TABLE = ("<!-- table -->", "<!-- /table -->")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    parser.add_argument("--docs", type=Path, help="a page whose <!-- table --> is to be replaced")
    parser.add_argument("--sheet", type=Path, help="where to save the first pairs' pictures as one image")
    parser.add_argument("--only", help="groups or methods, by commas (default: all)")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=["UNet"], help="which of the demo's models")
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--tuning", action="store_true", help="the tuning pairs instead: values may be chosen on them")
    options = parser.parse_args()
    comfy_host.ensure_importable()
    from demo.judge import Judge
    from demo.model import load_demo_model

    from .measures import measure
    from .methods import Studio
    from .pairs import pairs

    tasks = pairs(options.pairs, options.tuning)
    results: dict[str, list[dict[str, float]]] = {}
    made: dict[str, list[np.ndarray]] = {}
    judge = Judge.load()
    for network in options.network:
        chosen = _methods(options.only, network)
        kept = _Kept(ROOT / "runs" / "quality", network)
        with torch.inference_mode():
            studio = Studio(load_demo_model(network=network))
            for pair in tqdm(tasks, desc=network, mininterval=5):
                for name, method in chosen.items():
                    if kept.find(name, pair.seed) is None:
                        result = method(studio, pair)
                        figures = measure(result.picture, pair, judge)
                        kept.add(
                            name, pair.seed, {**figures, "rows": result.rows, "seconds": result.seconds}, result.picture
                        )
        prefix = "" if len(options.network) == 1 else f"{network}: "
        found = {prefix + name: [kept.require(name, pair.seed) for pair in tasks] for name in chosen}
        results |= with_gain(found, prefix + NOTHING)
        made |= {prefix + name: [kept.picture(name, pair.seed) for pair in tasks[:SHEET_PAIRS]] for name in chosen}
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


def with_gain(results: dict[str, list[dict[str, float]]], plain: str) -> dict[str, list[dict[str, float]]]:
    """The rows with their gain in appearance over the method `plain` on the same pair, if that is among them."""
    if plain not in results:
        return results
    base = [row["appearance"] for row in results[plain]]
    return {
        name: [{**row, "gain": row["appearance"] - less} for row, less in zip(rows, base, strict=True)]
        for name, rows in results.items()
    }


def _methods(only: str | None, network: str) -> dict[str, Any]:
    from .methods import GROUPS, UNET_ONLY

    everything = {name: method for group in GROUPS.values() for name, method in group.items()}
    chosen = _wanted(only, everything, GROUPS)
    return {name: method for name, method in chosen.items() if network == "UNet" or name not in UNET_ONLY}


def _wanted(only: str | None, everything: dict[str, Any], groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if only is None:
        return everything
    chosen: dict[str, Any] = {}
    for word in (part.strip() for part in only.split(",")):
        if word not in groups and word not in everything:
            raise SystemExit(
                f"--only: {word!r} is no group ({', '.join(groups)}) and no method: {', '.join(everything)}"
            )
        chosen |= groups[word] if word in groups else {word: everything[word]}
    return chosen


class _Kept:
    """A network's results on disk, for one state of its weights and of the code that makes and measures them."""

    def __init__(self, root: Path, network: str) -> None:
        other = DENOISER if network == "DiT" else DIT
        files = [file for file in sorted(FOLDER.glob("*.safetensors")) if file.name != other]
        files += sorted((ROOT / "inversion_core").rglob("*.py"))
        files += sorted((ROOT / "demo").glob("*.py"))
        files += [Path(__file__).with_name(f"{name}.py") for name in ("measures", "methods", "pairs")]
        state = hashlib.sha256()
        for file in files:
            state.update(file.read_bytes())
        self.folder = root / network / state.hexdigest()[:12]
        self.folder.mkdir(parents=True, exist_ok=True)

    def _file(self, method: str, seed: int) -> Path:
        return self.folder / f"{hashlib.sha256(method.encode()).hexdigest()[:8]}-{seed}.npz"

    def find(self, method: str, seed: int) -> dict[str, float] | None:
        file = self._file(method, seed)
        if not file.is_file():
            return None
        with np.load(file) as found:
            return json.loads(str(found["figures"]))

    def require(self, method: str, seed: int) -> dict[str, float]:
        figures = self.find(method, seed)
        assert figures is not None
        return figures

    def picture(self, method: str, seed: int) -> np.ndarray:
        with np.load(self._file(method, seed)) as found:
            return found["picture"].astype(np.float32) / 255

    def add(self, method: str, seed: int, figures: dict[str, float], picture: torch.Tensor) -> None:
        partial = self.folder / f"partial-{os.getpid()}.npz"  # several processes may share the work
        pixels = (picture.clamp(0, 1) * 255).round().byte().numpy()
        np.savez_compressed(partial, figures=np.array(json.dumps(figures)), picture=pixels)
        partial.replace(self._file(method, seed))


def summary(results: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Mean and 95 % interval of every measure of every method."""
    from .measures import interval

    table: dict[str, dict[str, float]] = {}
    for name, rows in results.items():
        table[name] = {}
        for key in rows[0]:
            mean, low, high = interval([row[key] for row in rows])
            table[name] |= {key: mean, f"{key}_low": low, f"{key}_high": high}
    return table


def markdown(table: dict[str, dict[str, float]], pairs: int) -> str:
    """The table for people: mean, and half the width of its 95 % interval."""
    from .measures import MEASURES

    gain = ["gain"] if all("gain" in row for row in table.values()) else []
    columns = [*MEASURES, *gain, "rows", "seconds"]
    lines = [f"| method ({pairs} pairs) | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name, row in table.items():
        cells = []
        for key in columns:
            half = (row[f"{key}_high"] - row[f"{key}_low"]) / 2
            digits = 0 if key == "rows" else 1 if key in ("seconds", "colour_delta_e") else 2
            cells.append(f"{row[key]:.{digits}f}" + (f" ±{half:.{digits}f}" if half >= 0.5 * 10**-digits else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- `{name}`: {meaning}" for name, meaning in MEASURES.items())]
    lines += [f"- `gain`: appearance less that of {NOTHING!r} on the same pair" for _ in gain]
    return "\n".join(lines) + "\n"


def sheet(titles: list[str], rows: list[list[np.ndarray]]) -> Image.Image:
    """A grid of pictures (H, W, 3), one column for each title."""
    gap, head = 6, 34
    width = gap + len(titles) * (_PANEL + gap)
    made = Image.new("RGB", (width, head + len(rows) * (_PANEL + gap)), "white")
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(size=12)
    for column, title in enumerate(titles):
        left = gap + column * (_PANEL + gap)
        words = title if len(title) <= 20 else title.replace(" + ", "\n+ ").replace(" (", "\n(")
        draw.multiline_text((left + _PANEL / 2, head / 2), words, fill="black", font=font, anchor="mm", align="center")
        for row, pictures in enumerate(rows):
            pixels = np.uint8(np.round(np.clip(pictures[column], 0, 1) * 255))
            made.paste(Image.fromarray(pixels), (left, head + row * (_PANEL + gap)))
    return made


if __name__ == "__main__":
    main()
