"""``python -m benchmarks.guidance --json FILE [--plot FILE]``: does Self-Similarity Guidance bring a lost shape back?

Pairs of the demo's world whose shape is lost when the prompt alone (`a shape on sky`) is sampled: the judge finds less
than half of its area. On these, with and without guidance from the same noise: overlap (IoU) and outline (F-score) of
the shape, self-similarity distance to its picture as `demo-vit` sees it, and processor time of one thread. The plot is
the mean loss before each guided step; without guidance, what it would be (steps of no length).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from demo import comfy as comfy_host

from .chart import chart

LOST = 0.5
UNGUIDED = 1e-6
"""A strength that changes nothing one could see, so that losses are measured all the same."""


def measure(count: int, repeats: tuple[int, ...], tuning: bool) -> dict[str, Any]:
    """Figures of each way, and its mean loss at each noise level."""
    from demo.model import load_demo_model
    from inversion_core.hosts.comfy_structure import StructureGuidance, attach, last_losses
    from inversion_core.injection import Window
    from inversion_core.metrics import self_similarity_distance

    from .quality.measures import Judges, interval
    from .quality.measures import measure as judged
    from .quality.methods import Studio, neutral
    from .quality.pairs import Pair, pairs

    studio, judges = Studio(load_demo_model()), Judges.load()
    rows: dict[str, list[dict[str, float]]] = {}
    losses: dict[str, list[list[tuple[float, float]]]] = {}

    def drawn(pair: Pair, name: str, strength: float, repeats: int = 1) -> dict[str, float]:
        picture = studio.reference(pair, "a").picture
        assert picture is not None
        guidance = StructureGuidance(studio.see, studio.demo.vae, picture, strength, repeats=repeats)
        if strength == UNGUIDED:
            guidance = StructureGuidance(studio.see, studio.demo.vae, picture, strength, Window())
        model = attach(studio.demo.model, guidance)
        started = time.process_time()
        result = studio.sample(pair, neutral(pair), model=model)
        seconds = time.process_time() - started
        if strength > 0:
            losses.setdefault(name, []).append(last_losses(model)[::repeats])
        found = judged(result.picture, pair, judges)
        seen = studio.see(result.picture.movedim(-1, 0)[None])
        kept = {key: found[key] for key in ("shape_iou", "boundary_f", "background")}
        return kept | {"distance": self_similarity_distance(seen, studio.see(picture)), "seconds": seconds}

    for pair in tqdm(pairs(count, tuning), desc="pairs"):
        plain = drawn(pair, "prompt alone", 0.0)
        if plain["shape_iou"] >= LOST:
            continue
        rows.setdefault("prompt alone", []).append(plain)
        drawn(pair, "prompt alone", UNGUIDED)
        for times in repeats:
            name = f"guided, {times} a step" if times > 1 else "guided"
            rows.setdefault(name, []).append(drawn(pair, name, 1.0, times))
    table = {name: {key: interval([one[key] for one in some]) for key in some[0]} for name, some in rows.items()}
    curves = {
        name: [(level[0][0], sum(loss for _, loss in level) / len(level)) for level in zip(*runs, strict=True)]
        for name, runs in losses.items()
    }
    return {"drawn": count, "lost": len(rows["prompt alone"]), "methods": table, "losses": curves}


def plot(figures: dict[str, Any], file: Path) -> None:
    """The losses over the steps; the guided ones end where the guidance does."""
    curves = {name: [(i + 1.0, loss) for i, (_, loss) in enumerate(run)] for name, run in figures["losses"].items()}
    last = max(len(run) for run in curves.values())
    top = 0.04 * (1 + int(max(loss for run in curves.values() for _, loss in run) / 0.04))
    chart(curves, {float(i): str(i) for i in range(1, last + 1)}, "step", "self-similarity loss", top).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guidance", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--plot", type=Path, help="where to save the losses over the steps as a picture")
    parser.add_argument(
        "--pairs", type=int, default=64, help="how many are drawn; those that keep their shape drop out"
    )
    parser.add_argument("--repeats", type=int, nargs="*", default=[1, 3], help="guided steps at each evaluation")
    parser.add_argument("--tuning", action="store_true", help="the tuning pairs instead")
    options = parser.parse_args()
    comfy_host.ensure_importable()
    with torch.inference_mode():
        figures = measure(options.pairs, tuple(options.repeats), options.tuning)
    options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if options.plot is not None:
        plot(figures, options.plot)
    print(f"{figures['lost']} of {figures['drawn']} pairs lose their shape")
    for name, row in figures["methods"].items():
        print(
            f"{name:>20} "
            + "  ".join(f"{key} {mean:.3f} [{low:.3f}, {high:.3f}]" for key, (mean, low, high) in row.items())
        )


if __name__ == "__main__":
    main()
