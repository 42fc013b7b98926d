"""``python -m benchmarks.correspondence --json FILE``: is the right part found, where the truth is known?

64 pairs of the demo world: one withheld shape in two poses with two appearances, so that each place of the one object
has its true place in the other. A token counts if its cell is at least nine tenths object. `within_0.2` and
`within_0.4` are the shares of tokens whose most-read reference token lies that near to the truth, in radii of the
object; `used` is the effective share of the reference object's tokens that is read (exponential of the entropy of how
much each is read, by how many there are). `chance` reads one of the object's tokens blindly.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from demo import world
from demo.vit import BACKBONE
from demo.weights import FOLDER
from inversion_core.correspondence import Correspondence, Grid, Matching, SparseMap
from inversion_core.features import Backbone, TimmExtractor, load

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

Figures = dict[str, float]


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
        how = "centred" if matching.centred else "as they are"
        name = f"{matching.descriptor}, {how}, temperature {matching.temperature}, balance {matching.balance:g}"
        distances, used = [], []
        for pair, (output, reference) in zip(tqdm(pairs, desc=name), seen, strict=True):
            found = Correspondence(output, reference, matching, *pair.masks).at(grid, grid)
            distance, share = judged(pair, grid, found)
            distances.append(distance)
            used.append(share)
        figures[name] = summary(distances, used)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.correspondence", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    options = parser.parse_args()
    figures = measure()
    options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for name, values in figures.items():
        print(f"{name:>50} " + "  ".join(f"{key} {value:.3f}" for key, value in values.items()))


if __name__ == "__main__":
    main()
