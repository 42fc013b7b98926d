"""One shape or one appearance to learn on one model: token, offset and their losses, for `trainer.train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..statistics import channel_statistics
from . import objectives
from .guides import Guides
from .inversion import Inversion, Kind, LowRankWeights
from .material import Material
from .model import Attention, Conditioning, LearningError, LearningModel
from .offset import APPEARANCE_SITES, SHAPE_SITES, Offset, recorded
from .plan import Plan
from .token import Token
from .trainer import Stage

OUTSIDE: dict[Kind, float] = {"shape": 0.5, "appearance": 0.0}
"""What the surroundings count in the diffusion loss: an outline is known by both its sides, an appearance is not."""
MAP_TOKENS = 256
"""Attention maps are compared with the mask at the resolution nearest to 16x16, as in Break-A-Scene."""
EVALUATION_ROWS = 8


class _Rows(NamedTuple):
    """What some rows of a step learn from."""

    clean: Tensor
    mask: Tensor
    noise: Tensor
    level: Tensor
    prompts: list[str]


class InversionLesson:
    """Token and offset of one concept and their losses on its material."""

    def __init__(self, model: LearningModel, material: Material, plan: Plan, guides: Guides | None = None) -> None:
        self.model, self.plan, self.material = model, plan, material
        self._guides = guides or Guides()
        self._attentions = model.attentions()
        sites = plan.sites or (SHAPE_SITES if plan.kind == "shape" else APPEARANCE_SITES)
        self._layers = sites.layers(model)
        sizes = {name: _size(layer) for name, layer in self._layers.items()}
        self.offset = Offset(sizes, plan.rank, plan.seed).to(model.device)
        self.token = Token(plan.name, model.words(plan.class_word), plan.vectors)
        for stage in plan.stages:
            self._guides.require(list(stage.objectives), self.token.vectors)
        self._latents, self._masks = material.latents.to(model.device), material.masks.to(model.device)

    @property
    def groups(self) -> Mapping[str, nn.Module]:
        """What is learned."""
        return {"token": self.token, "offset": self.offset}

    def after_step(self) -> None:
        """Keeps the token's length sane."""
        self.token.keep_sane()

    def applied(self) -> AbstractContextManager[None]:
        """While inside, the model works with the offset as it stands."""
        return self.offset.applied(self._layers)

    def save_memory(self) -> bool:
        """Switch the model to checkpointing; False if it was already."""
        if self.model.checkpointing is not None:
            return False
        self.model.checkpointing = self.applied
        return True

    def losses(self, stage: Stage, step: int, rows: Sequence[int]) -> dict[str, Tensor]:
        """Every objective of the stage, weighted, for these rows of this step."""
        seed = (0, self.plan.stages.index(stage), step)
        return self._losses(stage, self._rows(stage, seed, rows, stage.batch))

    @torch.no_grad()
    def evaluate(self, stage: Stage) -> float:
        """The same losses on noise that is never learned from, at the last stage's levels, so that stages compare."""
        stage = replace(stage, levels=self.plan.stages[-1].levels)
        total, at_once = 0.0, min(4, stage.batch)
        for first in range(0, EVALUATION_ROWS, at_once):
            rows = range(first, min(first + at_once, EVALUATION_ROWS))
            losses = self._losses(stage, self._rows(stage, (1,), rows, EVALUATION_ROWS))
            total += float(torch.stack([loss.sum() for loss in losses.values()]).sum())
        return total / EVALUATION_ROWS

    def inversion(self, settings: Mapping[str, Any]) -> Inversion:
        """What has been learned so far."""
        return Inversion(
            kind=self.plan.kind,
            name=self.plan.name,
            family=self.model.family,
            token={key: _kept(value) for key, value in self.token.vectors.items()},
            initial={key: _kept(value) for key, value in self.token.initial.items()},
            offset={name: LowRankWeights(_kept(up), _kept(down)) for name, (up, down) in self.offset.weights().items()},
            settings=settings,
            pictures=self.material.digest,
            preview=self.material.preview,
        )

    # --- data ---------------------------------------------------------------------------------------------------------

    def _rows(self, stage: Stage, stream: tuple[int, ...], rows: Sequence[int], batch: int) -> _Rows:
        """Rows of a step, drawn from its own stream. Levels are spread evenly, so that the loss varies little."""
        seed = [self.plan.seed, *stream]
        shift = np.random.default_rng(seed).random()
        low, high = stage.levels
        chosen, noises, levels, prompts = [], [], [], []
        for row in rows:
            rng = np.random.default_rng([*seed, 1, row])
            which = int(rng.integers(len(self.material.prompts)))
            chosen.append(which)
            prompts.append(str(rng.choice(self.material.prompts[which])))
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            noises.append(torch.randn(self._latents.shape[1:], generator=generator))
            levels.append(low + (high - low) * (row + shift) / batch)
        clean = self._latents[chosen]
        level = torch.tensor(levels, device=clean.device, dtype=torch.float32)
        return _Rows(clean, self._masks[chosen], torch.stack(noises).to(clean), level, prompts)

    @torch.no_grad()
    def sample(self, steps: int = 8) -> Tensor:
        """A latent (1, C, h, w) of the first prompt as the model makes it now, without guidance: to look at.

        Deterministic DDIM from fixed noise over evenly spaced levels.
        """
        model, prompt = self.model, [self.material.prompts[0][0]]
        generator = torch.Generator().manual_seed(self.plan.seed)
        x = torch.randn(1, *self._latents.shape[1:], generator=generator).to(self._latents)
        levels = torch.linspace(1 - 1e-4, 0, steps + 1, device=x.device)[:, None]
        conditioning = model.encode(prompt, {self.plan.name: self.token.vectors})
        with self.applied():
            for level, following in pairwise(levels):
                output, schedule = model.predict(x, level, conditioning), model.schedule(level)
                clean = objectives.clean_estimate(model.prediction, output, x, schedule)
                noise = (x - schedule.alpha * clean) / schedule.sigma
                x = objectives.noised(clean, noise, model.schedule(following))
        return x

    # --- losses -------------------------------------------------------------------------------------------------------

    def _losses(self, stage: Stage, rows: _Rows) -> dict[str, Tensor]:
        model, wanted = self.model, stage.objectives
        schedule = model.schedule(rows.level)
        noisy = objectives.noised(rows.clean, rows.noise, schedule)
        conditioning = model.encode(rows.prompts, {self.plan.name: self.token.vectors})
        with ExitStack() as stack:
            stack.enter_context(self.applied())
            seen = stack.enter_context(recorded(self._watched(wanted)))
            output = model.predict(noisy, rows.level, conditioning)
        clean = objectives.clean_estimate(model.prediction, output, noisy, schedule)
        found: dict[str, Tensor] = {}
        if wanted.keys() & {"diffusion", "min_snr"}:
            aim = objectives.target(model.prediction, rows.clean, rows.noise, schedule)
            error = objectives.masked_diffusion(output, aim, rows.mask, OUTSIDE[self.plan.kind])
            found["diffusion"] = error
            found["min_snr"] = error * objectives.min_snr(model.prediction, schedule)
        if "attention_on_mask" in wanted:
            found["attention_on_mask"] = self._attention_on_mask(rows, conditioning, seen)
        if "attention_distillation" in wanted:
            found["attention_distillation"] = self._distillation(rows, seen) * objectives.alpha_bar(schedule)
        if "moments" in wanted:
            mean, std = self._reference_moments
            found["moments"] = objectives.moments(clean, rows.mask, mean, std) * objectives.alpha_bar(schedule)
        if "features" in wanted:
            assert self._guides.look is not None
            found["features"] = self._guides.look.distance(clean, rows.mask, schedule)
        # Of the token alone, so the same for every row.
        if "token_mse" in wanted:
            found["token_mse"] = self._guides.token_mse(self.token.vectors).expand(len(rows.prompts))
        if "projected" in wanted:
            found["projected"] = self._guides.projected(self.token.vectors).expand(len(rows.prompts))
        return {name: value * wanted[name] for name, value in found.items() if name in wanted}

    def _attention_on_mask(self, rows: _Rows, conditioning: Conditioning, seen: Mapping[str, Tensor]) -> Tensor:
        places = conditioning.places[self.plan.name]
        latent = (rows.clean.shape[-2], rows.clean.shape[-1])
        queries = {name: seen[f"{name}.to_q"] for name in self._sites("cross")}
        tokens = min((q.shape[1] for q in queries.values()), key=lambda n: abs(np.log(n / MAP_TOKENS)))
        maps = [
            objectives.attention_map(q, seen[f"{name}.to_k"], places, self._attentions[name].heads)
            for name, q in queries.items()
            if q.shape[1] == tokens
        ]
        mask = F.interpolate(rows.mask, size=objectives.grid_of(tokens, latent), mode="area").flatten(1)
        return objectives.attention_on_mask(torch.stack(maps).mean(0), mask)

    def _distillation(self, rows: _Rows, seen: Mapping[str, Tensor]) -> Tensor:
        latent = (rows.clean.shape[-2], rows.clean.shape[-1])
        found = []
        for name, site in self._sites("self").items():
            q, k, v = (seen[f"{name}.{part}"] for part in ("to_q", "to_k", "to_v"))
            k_ref, v_ref, mask_ref = self._reference_tokens[name]
            mask = F.interpolate(rows.mask, size=objectives.grid_of(q.shape[1], latent), mode="area").flatten(1)
            found.append(objectives.attention_distillation(q, k, v, k_ref, v_ref, site.heads, mask, mask_ref))
        return torch.stack(found).mean(0)

    def _sites(self, kind: str) -> dict[str, Attention]:
        """The attentions objectives look at: all that read the prompt, and the decoder's self-attentions."""
        return {
            name: site
            for name, site in self._attentions.items()
            if site.kind == kind and (kind == "cross" or site.part == "decoder")
        }

    def _watched(self, wanted: Mapping[str, float]) -> dict[str, nn.Module]:
        watched = {
            "attention_on_mask": ("cross", ("to_q", "to_k")),
            "attention_distillation": ("self", ("to_q", "to_k", "to_v")),
        }
        return {
            f"{name}.{part}": site.projections[part]
            for objective, (kind, parts) in watched.items()
            if objective in wanted
            for name, site in self._sites(kind).items()
            for part in parts
        }

    @property
    def _reference(self) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w) of the pictures themselves and their masks (B, 1, h, w)."""
        return self.material.reference.to(self.model.device), self.material.reference_masks.to(self.model.device)

    @cached_property
    def _reference_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C,) of the pictures' latents inside the masks."""
        latents, masks = self._reference
        joined, mask = (torch.cat(list(one.flatten(2)), dim=1)[None, :, :, None] for one in (latents, masks))
        found = channel_statistics(joined, mask)
        return found.mean.flatten(), found.std.flatten()

    @cached_property
    def _reference_tokens(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Site -> keys and values (1, M, C) of the clean pictures in the untouched model, and which are in a mask."""
        latents, masks = self._reference
        size = (latents.shape[-2], latents.shape[-1])
        level = torch.zeros(len(latents), device=latents.device)
        schedule = self.model.schedule(level)
        alpha = schedule.alpha.view(-1, 1, 1, 1)
        with torch.no_grad(), recorded(self._watched({"attention_distillation": 1.0})) as seen:
            empty = self.model.encode([""] * len(latents), {})
            self.model.predict(latents * alpha.to(latents), level, empty)
        result = {}
        for name in self._sites("self"):
            k, v = (seen[f"{name}.{part}"].detach() for part in ("to_k", "to_v"))
            grid = objectives.grid_of(k.shape[1], size)
            inside = F.interpolate(masks, size=grid, mode="area").flatten() > 0.5
            if not bool(inside.any()):
                inside = torch.ones_like(inside)
            result[name] = (k.flatten(0, 1)[None], v.flatten(0, 1)[None], inside)
        return result


def _size(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer of whatever class."""
    inputs, outputs = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if not isinstance(inputs, int) or not isinstance(outputs, int):
        raise LearningError(f"an offset needs linear layers, but the model has a {type(layer).__name__} there")
    return inputs, outputs


def _kept(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32).clone()
