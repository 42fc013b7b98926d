"""``python -m benchmarks.correspondence --json FILE [--plot FILE]``: is the right part found, where the truth is known?

64 pairs of the demo world: one withheld shape in two poses with two appearances, so that each place of the one object
has its true place in the other. A token counts if its cell is at least nine tenths object. `within_0.2` and
`within_0.4` are the shares of tokens whose most-read reference token lies that near to the truth, in radii of the
object; `used` is the effective share of the reference object's tokens that is read (exponential of the entropy of how
much each is read, by how many there are). `chance` reads one of the object's tokens blindly.

`noise`: the same of the demo model's own queries and keys, as Cross-Image Attention asks them (mean of the heads,
empty prompt, each picture with its own noise), at several noise levels and each self-attention, with the same masks.
The features do not depend on the noise.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from demo import comfy as comfy_host
from demo import world
from demo.vit import BACKBONE
from demo.weights import FOLDER
from inversion_core.correspondence import Correspondence, Grid, Matching, SparseMap
from inversion_core.features import Backbone, TimmExtractor, load

from .chart import chart

PAIRS = 64
FIRST_SEED = 400_000
"""Disjoint from training (seeds of a million and up) and from the other benchmarks."""
NEAR = (0.2, 0.4)
METHODS = (
    Matching("keys", centred=False, balance=0),
    Matching("keys", balance=0),
    Matching("keys"),
    Matching(centred=False, balance=0),
    Matching(centred=False),
    Matching(balance=0),
    Matching(balance=0.5),
    Matching(balance=0.8),
    Matching(),
    Matching(temperature=0.05),
    Matching(temperature=0.2),
)

PERCENTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)
"""Places in the schedule: 0 is all noise."""

Figures = dict[str, float]


def _name(matching: Matching) -> str:
    how = "centred" if matching.centred else "as they are"
    return f"{matching.descriptor}, {how}, temperature {matching.temperature}, balance {matching.balance:g}"


DEFAULT = _name(Matching())


class Pair:
    """One shape, twice. Pictures (1, 3, H, W), masks (1, 1, H, W)."""

    def __init__(self, index: int) -> None:
        first = world.sample(FIRST_SEED + 2 * index, shapes=world.WITHHELD_SHAPES, textures=world.TEXTURES)
        second = world.sample(FIRST_SEED + 2 * index + 1, textures=world.TEXTURES)
        self.factors = first, replace(second, shape=first.shape)
        rendered = [world.render(factors) for factors in self.factors]
        self.pictures = [torch.from_numpy(one.image).permute(2, 0, 1)[None] for one in rendered]
        self.masks = [torch.from_numpy(one.mask)[None, None] for one in rendered]

    def inside(self, which: int, grid: Grid) -> Tensor:
        """(N,) bool: the tokens that are all but wholly object."""
        return F.interpolate(self.masks[which], size=grid, mode="area").flatten() >= 0.9

    def places(self, which: int, grid: Grid) -> Tensor:
        """(N, 2): where each token lies in the object's own coordinates, in radii."""
        pose = self.factors[which].pose
        y, x = ((torch.arange(side) + 0.5) / side for side in grid)
        dy, dx = torch.meshgrid(y - pose.y, x - pose.x, indexing="ij")
        cos, sin = np.cos(pose.rotation), np.sin(pose.rotation)
        return torch.stack((dx * cos + dy * sin, dy * cos - dx * sin), dim=-1).flatten(0, 1) / pose.radius


def judged(pair: Pair, grid: Grid, found: SparseMap) -> tuple[Tensor, float]:
    """How far from the truth each token of the object reads most, and how much of the reference is in use."""
    inside, readable = pair.inside(0, grid), pair.inside(1, grid)
    away = pair.places(1, grid)[found.index[:, 0]] - pair.places(0, grid)
    read = torch.zeros(len(readable)).index_add(0, found.index[inside].flatten(), found.weight[inside].flatten())
    shares = read[readable] / read[readable].sum().clamp_min(1e-12)
    return away.norm(dim=1)[inside], float(torch.special.entr(shares).sum().exp() / readable.sum())


def chance(pair: Pair, grid: Grid) -> Tensor:
    """The distances from each token's truth to every token of the reference object."""
    true, all_ = pair.places(0, grid)[pair.inside(0, grid)], pair.places(1, grid)[pair.inside(1, grid)]
    return torch.cdist(true, all_).flatten()


def summary(distances: list[Tensor], used: list[float]) -> Figures:
    together = torch.cat(distances)
    near = {f"within_{limit}": float((together < limit).float().mean()) for limit in NEAR}
    return near | ({"used": float(np.mean(used))} if used else {})


def measure() -> dict[str, Figures]:
    backbone = Backbone(**BACKBONE)
    extractor = TimmExtractor(load(backbone, FOLDER / backbone.file), backbone)
    pairs = [Pair(i) for i in range(PAIRS)]
    seen = [[extractor(picture) for picture in pair.pictures] for pair in tqdm(pairs, desc="features")]
    grid = seen[0][0].grid
    figures = {"chance": summary([chance(pair, grid) for pair in pairs], [])}
    for matching in METHODS:
        name = _name(matching)
        distances, used = [], []
        for pair, (output, reference) in zip(tqdm(pairs, desc=name), seen, strict=True):
            found = Correspondence(output, reference, matching, *pair.masks).at(grid, grid)
            distance, share = judged(pair, grid, found)
            distances.append(distance)
            used.append(share)
        figures[name] = summary(distances, used)
    return figures


def measure_noise() -> dict[str, Any]:
    """Noise levels as `percent` of the schedule, and for each self-attention the figures at each."""
    comfy_host.ensure_importable()
    from .own_matching import OwnMatching

    with torch.inference_mode():
        own = OwnMatching()
        pairs = [Pair(i) for i in range(PAIRS)]
        latents = [own.encoded(pair.pictures) for pair in pairs]
        found: dict[str, list[Figures]] = {}
        for percent in tqdm(PERCENTS, desc="noise levels"):
            judgements: dict[str, tuple[list[Tensor], list[float]]] = {}
            for i, pair in enumerate(pairs):
                for site, (grid, one) in own.maps(latents[i], pair.masks[1], percent, seed=i).items():
                    distance, share = judged(pair, grid, one)
                    distances, used = judgements.setdefault(site, ([], []))
                    distances.append(distance)
                    used.append(share)
            for site, both in judgements.items():
                found.setdefault(site, []).append(summary(*both))
    return {"percent": list(PERCENTS), "sites": found}


def plot(figures: dict[str, Any], file: Path) -> None:
    """The share of tokens within the nearer distance, over the noise level."""
    key, noise = f"within_{NEAR[0]}", figures["noise"]
    ticks = {1 - percent: f"{percent:.0%}" for percent in noise["percent"]}
    best = sorted(noise["sites"], key=lambda site: -max(one[key] for one in noise["sites"][site]))[:4]
    curves = {"demo-vit": [(x, figures[DEFAULT][key]) for x in ticks]}
    curves |= {f"Q.K, {s}": list(zip(ticks, (one[key] for one in noise["sites"][s]), strict=True)) for s in best}
    curves["blindly"] = [(x, figures["chance"][key]) for x in ticks]
    chart(curves, ticks, "place in the schedule (left: clean, right: noise)", "right within 0.2 radii", 1.0).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.correspondence", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--plot", type=Path, help="where to save the curve over the noise levels as a picture")
    options = parser.parse_args()
    figures: dict[str, Any] = {**measure(), "noise": measure_noise()}
    options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if options.plot is not None:
        plot(figures, options.plot)
    for site, values in figures.pop("noise")["sites"].items():
        print(f"{site:>50} " + "  ".join(f"{one['within_0.2']:.3f}" for one in values))
    for name, values in figures.items():
        print(f"{name:>50} " + "  ".join(f"{key} {value:.3f}" for key, value in values.items()))


if __name__ == "__main__":
    main()
