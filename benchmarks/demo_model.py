"""``python -m benchmarks.demo_model --json FILE``: does the demo model draw what its prompts say?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from demo import comfy as comfy_host
from demo import world

if TYPE_CHECKING:
    from demo.model import Network

PROMPTS = 300
FIRST_SEED = 200_000
"""Disjoint from training (seeds of a million and up) and from what anything was tuned on."""


def measure(network: Network, steps: int, cfg: float, sheet: Path | None) -> dict[str, float]:
    """All figures: the judge on true renders, the model on prompts, the autoencoder on withheld renders."""
    from demo.generate import generate
    from demo.judge import FACTORS, Judge
    from demo.model import load_demo_model
    from demo.train.autoencoder import psnr
    from demo.train.data import pictures, write_grid

    judge, demo = Judge.load(), load_demo_model(network=network)
    seeds = range(FIRST_SEED, FIRST_SEED + PROMPTS)

    truth, factors = pictures(seeds, shapes=tuple(world.SHAPES), textures=world.TEXTURES)
    verdict = judge.look(((truth + 1) / 2).permute(0, 2, 3, 1))
    on_truth = [np.mean(_right(verdict, factors, name)) for name in FACTORS]

    wanted = [world.sample(seed) for seed in seeds]
    made = []
    for first in tqdm(range(0, PROMPTS, 25), desc="pictures"):
        part = wanted[first : first + 25]
        prompts = [world.prompt(f) for f in part]
        made.append(generate(demo, prompts, seeds[first : first + 25], steps=steps, cfg=cfg))
    images = torch.cat(made)
    found = judge.look(images)
    if sheet is not None:
        write_grid(images[:96].permute(0, 3, 1, 2) * 2 - 1, sheet, 12)

    withheld, _ = pictures(range(FIRST_SEED, FIRST_SEED + 96), shapes=world.WITHHELD_SHAPES, textures=world.TEXTURES)
    coded = demo.vae.decode(demo.vae.encode(((withheld + 1) / 2).permute(0, 2, 3, 1)))
    return {
        "judge_on_truth": float(min(on_truth)),
        **{name: float(np.mean(_right(found, wanted, name))) for name in FACTORS},
        "autoencoder_psnr_db": psnr(withheld, coded.permute(0, 3, 1, 2) * 2 - 1),
    }


def _right(verdict, factors: list[world.Factors], name: str) -> list[bool]:
    return [found == world.value(f, name) for found, f in zip(getattr(verdict, name), factors, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_model", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--sheet", type=Path, help="where to save the first 96 pictures as one PNG")
    parser.add_argument("--network", choices=["UNet", "DiT"], default="UNet", help="which of the diffusion models")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0)
    options = parser.parse_args()
    comfy_host.ensure_importable()
    with torch.inference_mode():
        figures = measure(options.network, options.steps, options.cfg, options.sheet)
    options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for name, value in figures.items():
        print(f"{name:>20} {value:.4f}")


if __name__ == "__main__":
    main()
