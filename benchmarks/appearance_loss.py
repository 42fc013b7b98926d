"""``python -m benchmarks.appearance_loss --json FILE``: why did a CLS target in token space fail, and what helps?

1. Probe: is the appearance's token in the CLS vector at all? Ridge regression from the CLS of a picture to the words'
   embeddings of its colour and texture; whole combinations of the two are held out, R2 is against the training mean,
   and the same with the targets of the combinations exchanged at random says what chance gives.
2. Loss: token vectors learned towards a target by each objective alone, no denoiser involved, as the founding plan had
   it: how much of its beginning each loses (1 = all of it).
3. Swap test: the vectors in prompts. Does the appearance come, on shapes it was not seen on, and is the shape obeyed?

The withheld texture in eight colours, one picture each, as in ``benchmarks.inversion``. The ViT is the demo's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from demo import comfy as comfy_host
from demo import world
from demo.vit import BACKBONE
from demo.weights import FOLDER
from inversion_core.features import Backbone, TimmExtractor, load
from inversion_core.learning import objectives
from inversion_core.learning.objectives import Whitening
from inversion_core.learning.token import Token

FIRST_SEED = 42_000_000
PICTURES = 6
"""Of each combination of a colour and a texture that the demo model knows."""
HELD_OUT = 12
"""Combinations, of 48; every colour and every texture stays among the others."""
SHUFFLES = 20
PENALTIES = tuple(10.0**power for power in range(-3, 5))
STEPS, RATE = 300, 1e-2
REACH, PENALTY = 0.1, 0.01
"""E4T's cap on what is learned, as the founding plan had it: class word + 0.1 * learned, with an L2 penalty."""


class Ridge(NamedTuple):
    """A linear map with an intercept: (B, D) -> (B, K)."""

    mean_x: Tensor
    mean_y: Tensor
    weights: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean_x) @ self.weights + self.mean_y


def ridge(x: Tensor, y: Tensor, penalty: float) -> Ridge:
    """Least squares with an L2 penalty, as a share of the features' mean variance."""
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    cx, cy = x - mean_x, y - mean_y
    gram = cx.T @ cx
    gram += penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return Ridge(mean_x, mean_y, torch.linalg.solve(gram, cx.T @ cy))


def r_squared(predicted: Tensor, truth: Tensor, mean: Tensor) -> float:
    """1 - error / error of the training mean: 0 = no better than it, 1 = perfect, negative = worse."""
    return float(1 - (predicted - truth).square().sum() / (truth - mean).square().sum())


def probe(x: Tensor, y: Tensor, groups: Tensor, held: Tensor) -> float:
    """Held-out R2. The penalty is chosen by leaving out parts of the training combinations in turn."""
    x, y = x.double(), y.double()
    train, test = ~torch.isin(groups, held), torch.isin(groups, held)
    inner = groups[train].unique()
    scores = {
        penalty: np.mean([_score(x[train], y[train], groups[train], part, penalty) for part in inner.chunk(6)])
        for penalty in PENALTIES
    }
    best = max(scores, key=scores.__getitem__)
    fitted = ridge(x[train], y[train], best)
    return r_squared(fitted(x[test]), y[test], fitted.mean_y)


def _score(x: Tensor, y: Tensor, groups: Tensor, part: Tensor, penalty: float) -> float:
    out = torch.isin(groups, part)
    fitted = ridge(x[~out], y[~out], penalty)
    return r_squared(fitted(x[out]), y[out], fitted.mean_y)


@dataclass(frozen=True, eq=False)
class Seen:
    """Pictures of known appearances: CLS vectors (M, D), words' embeddings (M, 2 C), and the combination of each."""

    raw: Tensor
    normed: Tensor
    words: Tensor
    combination: Tensor
    held: Tensor


class Study:
    """The demo model, its ViT, and everything measured with them."""

    def __init__(self) -> None:
        from demo.judge import Judge
        from demo.model import load_demo_model

        backbone = Backbone(**BACKBONE)
        self.vit = TimmExtractor(load(backbone, FOLDER / backbone.file), backbone)
        self.demo, self.judge = load_demo_model(), Judge.load()
        embeddings = self.demo.clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
        tokenizer = self.demo.clip.tokenizer.clip_l
        self.word: Callable[[str], Tensor] = lambda text: (
            embeddings[tokenizer.tokenizer(text)["input_ids"][1:-1]].float().mean(0).clone()
        )

    def look(self, factors: Sequence[world.Factors]) -> tuple[Tensor, Tensor]:
        """CLS of the pictures, before and after the last LayerNorm."""
        images = torch.from_numpy(np.stack([world.render(one).image for one in factors])).permute(0, 3, 1, 2)
        parts = [self.vit(part) for part in images.split(32)]
        raw, normed = zip(*((one.cls, one.cls_normed) for one in parts), strict=True)
        return torch.cat(raw).float().clone(), torch.cat(normed).float().clone()

    def seen(self) -> Seen:
        """Pictures of every combination of a known colour and texture."""
        pairs = list(product(world.COLOURS, world.TRAINED_TEXTURES))
        factors, combination = [], []
        for index, (colour, texture) in enumerate(pairs):
            seed = FIRST_SEED + 10_000 * index
            drawn = (world.sample(seed + n, textures=(texture,)) for n in range(10_000))
            found = [
                one
                for _, one in zip(range(PICTURES), (f for f in drawn if f.appearance.colour == colour), strict=False)
            ]
            factors += found
            combination += [index] * len(found)
        raw, normed = self.look(factors)
        words = torch.stack(
            [torch.cat([self.word(one.appearance.colour), self.word(one.appearance.texture)]) for one in factors]
        )
        order = np.random.default_rng(0).permutation(len(pairs))
        return Seen(raw, normed, words, torch.tensor(combination), torch.from_numpy(order[:HELD_OUT]))

    def probes(self, seen: Seen) -> dict[str, float]:
        """R2 of every kind of feature; `shuffled`: with the combinations' targets exchanged."""
        known = ~torch.isin(seen.combination, seen.held)
        white = Whitening.fit(seen.normed[known])(seen.normed)
        found = {}
        for name, features in (("raw", seen.raw), ("normed", seen.normed), ("whitened", white)):
            found[f"{name}_to_words"] = probe(features, seen.words, seen.combination, seen.held)
        found["words_to_whitened"] = probe(seen.words, white, seen.combination, seen.held)
        rng, shuffled = np.random.default_rng(1), []
        for _ in range(SHUFFLES):
            order = torch.from_numpy(rng.permutation(int(seen.combination.max()) + 1))
            firsts = torch.stack([seen.words[seen.combination == index][0] for index in range(len(order))])
            shuffled.append(probe(seen.normed, firsts[order][seen.combination], seen.combination, seen.held))
        return {**found, "shuffled_mean": float(np.mean(shuffled)), "shuffled_best": float(np.max(shuffled))}

    def swap(self, vectors: Tensor, concept: Any, prompts: int) -> dict[str, float]:
        """The vectors (n, C) as <look> in prompts."""
        from demo.generate import generate
        from demo.model import DemoModel
        from inversion_core.hosts.comfy_inversion import with_tokens

        from .inversion.measures import appearance_figures

        wanted = concept.wanted(prompts)
        clip = with_tokens(self.demo.clip, {"look": {"clip_l": vectors.detach()}})
        demo = DemoModel(self.demo.model, clip, self.demo.vae)
        pictures = generate(demo, [one.prompt for one in wanted], [one.seed for one in wanted])
        return appearance_figures(pictures, wanted, self.judge)


class Outcome(NamedTuple):
    """Vectors (n, C) and the loss step by step."""

    vectors: Tensor
    losses: list[float]


def descend(token: nn.Module, loss: Callable[[], Tensor], after: Callable[[], None] = lambda: None) -> list[float]:
    """Adam from where the parameters stand; the loss before every step and after the last."""
    with torch.inference_mode(False), torch.enable_grad():
        optimiser, losses = torch.optim.Adam(token.parameters(), lr=RATE), []
        for _ in range(STEPS):
            optimiser.zero_grad()
            found = loss()
            losses.append(float(found.detach()))
            found.backward()
            optimiser.step()
            after()
        return [*losses, float(loss().detach())]


class _Capped(nn.Module):
    """E4T's parametrisation: class word + `REACH` * learned."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.start, self.learned = start, nn.Parameter(torch.zeros_like(start))

    def forward(self) -> Tensor:
        return self.start + REACH * self.learned


def remedies(
    start: Tensor, raw: Tensor, normed: Tensor, white: Whitening, head: Ridge, tail: Ridge
) -> dict[str, Outcome]:
    """Every objective that needs no denoiser, each from the class word's vector (1, C).

    Args:
        raw, normed: (D,) the picture's CLS.
        head: from the two words' embeddings (2 C) to the whitened CLS; `tail`: from the normed CLS to them.
    """
    with torch.inference_mode(False):
        start, raw, normed = start.clone(), raw.clone(), normed.clone()
        found = {}

        def record(
            name: str, make: Callable[[Tensor], Any], wanted: Callable[[Tensor], Tensor], count: int = 1
        ) -> None:
            module = make(start.expand(count, -1).clone())
            token = isinstance(module, Token)

            def read() -> Tensor:
                return module.vectors["clip_l"] if isinstance(module, Token) else module()

            losses = descend(module, lambda: wanted(read()), module.keep_sane if token else lambda: None)
            found[name] = Outcome(read().detach().clone(), losses)

        def learned(vectors: Tensor) -> Token:
            return Token("look", {"clip_l": vectors}, len(vectors))

        def capped(target: Tensor) -> Callable[[Tensor], Tensor]:
            def loss(vectors: Tensor) -> Tensor:
                change = (vectors - start) / REACH
                return objectives.token_mse(vectors, target) + PENALTY * change.square().mean()

            return loss

        record("token_mse, raw CLS, capped as E4T", _Capped, capped(raw))
        record("token_mse, raw CLS", learned, lambda v: objectives.token_mse(v, raw))
        scaled = F.normalize(normed, dim=0) * start.norm()
        record("token_mse, CLS at a word's length", learned, lambda v: objectives.token_mse(v, scaled))
        # Of doubles, as the ridge is; `projected` takes the mean over vectors, here they are laid side by side.
        aim = white(normed)
        record(
            "projected, whitened CLS",
            learned,
            lambda v: objectives.projected(v.flatten()[None], _as_module(head), aim),
            count=2,
        )
        predicted = tail(normed.double()[None]).float().reshape(2, -1)
        found["ridge from CLS to words, nothing learned"] = Outcome(predicted, [])
        found["the class word"] = Outcome(start.clone(), [])
        return found


def _as_module(fitted: Ridge) -> nn.Module:
    layer = nn.Linear(fitted.weights.shape[0], fitted.weights.shape[1])
    with torch.no_grad():
        layer.weight.copy_(fitted.weights.T)
        layer.bias.copy_(fitted.mean_y - fitted.mean_x @ fitted.weights)
    return layer.requires_grad_(False)


def measure(
    number: int, prompts: int, tuning: bool, save: Callable[[dict[str, Any], dict[str, list[float]]], None]
) -> None:
    """All figures and curves, saved after each concept."""
    from .inversion.concepts import concepts
    from .inversion.methods import CLASS_WORD

    study = Study()
    seen = study.seen()
    known = ~torch.isin(seen.combination, seen.held)
    figures: dict[str, Any] = {"probe": study.probes(seen)}
    white = Whitening.fit(seen.normed[known])
    head, tail = (
        ridge(seen.words[known], white(seen.normed[known]), 1e-2),
        ridge(seen.normed[known], seen.words[known], 1.0),
    )
    scale = {"word": float(study.word("red").norm()), "cls_raw": float(seen.raw.norm(dim=1).mean())}
    scale["largest_share_of_variance"] = float(seen.raw.var(0).max() / seen.raw.var(0).sum())
    figures["lengths"] = scale
    rows: dict[str, list[dict[str, float]]] = {}
    curves: dict[str, list[float]] = {}
    for concept in concepts("appearance", number, tuning):
        raw, normed = study.look([concept.factors])
        start = study.word(CLASS_WORD["appearance"])[None]
        for name, outcome in remedies(start, raw[0], normed[0], white, head, tail).items():
            found = study.swap(outcome.vectors, concept, prompts)
            if outcome.losses:
                found["loss_fall"] = 1 - outcome.losses[-1] / outcome.losses[0]
                curves.setdefault(name, [loss / outcome.losses[0] for loss in outcome.losses])
            rows.setdefault(name, []).append(found)
            print(concept.seed, name, {key: round(value, 3) for key, value in found.items()}, flush=True)
        figures["objectives"] = {
            name: {key: float(np.mean([row[key] for row in some])) for key in some[0]} for name, some in rows.items()
        }
        figures |= {"concepts": len(next(iter(rows.values()))), "prompts": prompts}
        save(figures, curves)


def tables(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| probe | held-out R2 |", "| --- | --- |"]
    lines += [f"| {name.replace('_', ' ')} | {value:.2f} |" for name, value in figures["probe"].items()]
    keys = ("loss_fall", "appearance", "shape_obeyed", "colour", "texture")
    lines += ["", f"| objective | {' | '.join(keys)} |", "| --- |" + " --- |" * len(keys)]
    for name, row in figures["objectives"].items():
        lines.append(f"| {name} | {' | '.join(f'{row[key]:.2f}' if key in row else '-' for key in keys)} |")
    return "\n".join(lines) + "\n"


def plot(curves: dict[str, list[float]]) -> Image.Image:
    """Losses as shares of their beginnings, over the steps."""
    width, height, margin = 640, 320, 36
    colours = ((200, 60, 50), (230, 150, 40), (60, 140, 70), (60, 100, 200))
    image = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    draw.line([(margin, margin), (margin, height - margin), (width - margin, height - margin)], fill=(0, 0, 0))
    draw.text((4, margin - 6), "1", fill=(0, 0, 0))
    draw.text((4, height - margin - 6), "0", fill=(0, 0, 0))
    draw.text((width - 90, height - margin + 8), f"{STEPS} steps", fill=(0, 0, 0))
    for index, (name, values) in enumerate(curves.items()):
        colour = colours[index % len(colours)]
        draw.line(
            [
                (margin + (width - 2 * margin) * step / STEPS, margin + (height - 2 * margin) * (1 - min(1.0, value)))
                for step, value in enumerate(values)
            ],
            fill=colour,
            width=2,
        )
        draw.text((width // 2 - 40, height // 2 + 14 * index), name, fill=colour)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.appearance_loss", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--markdown", type=Path, help="where to write the tables")
    parser.add_argument("--plot", type=Path, help="where to save the losses' curves as a picture")
    parser.add_argument("--concepts", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=12, help="pictures for each concept and objective")
    parser.add_argument("--tuning", action="store_true", help="the tuning concepts: values may be chosen on them")
    options = parser.parse_args()
    comfy_host.ensure_importable()

    def save(figures: dict[str, Any], curves: dict[str, list[float]]) -> None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        if options.plot is not None:
            plot(curves).save(options.plot)
        if options.markdown is not None:
            options.markdown.write_text(tables(figures), encoding="utf-8")

    with torch.inference_mode():
        measure(options.concepts, options.prompts, options.tuning, save)
    print(tables(json.loads(options.json.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
