"""What KV Injection is measured against: the same two edits, done as they are usually done. For the benchmark only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inversion_core.hosts.comfy_unet import sites_of
from inversion_core.presets import CROSS_IMAGE, MASACTRL
from inversion_core.reference import Reference
from inversion_core.sites import select

from .unets import Patcher


def doubled_masactrl(model: Patcher, source: Reference) -> Patcher:
    """MasaCtrl with the source in the batch: every row goes through the model a second time, at every step."""
    chosen = select(MASACTRL.steps[0].sites, sites_of(model.model.diffusion_model))

    def read_the_source(n: Tensor, context: Tensor, value: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
        if _name(extra) in chosen:
            target = context[len(context) // 2 :]
            context = value = torch.cat((target, target))
        return n, context, value

    clone = _with_companions(model, [source])
    clone.set_model_attn1_patch(read_the_source)
    return clone


def materialised_cross_image(model: Patcher, appearance: Reference, shape: Reference) -> Patcher:
    """Cross-Image Attention with both pictures in the batch, and the whole attention map of every head in memory."""
    sites = sites_of(model.model.diffusion_model)
    step = CROSS_IMAGE.steps[0]
    clone = _with_companions(model, [appearance, shape])

    def attend(q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        (_, look, layout), rows = range(3), len(q) // 3
        k, v = (_swapped(x, look, rows) for x in (k, v))
        q = _swapped(q, layout, rows)
        q, k, v = (x.unflatten(2, (extra["n_heads"], -1)).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)
        mean = weights[:rows].mean(dim=-1, keepdim=True)
        weights[:rows] = ((weights[:rows] - mean) * step.edit.contrast + mean).clamp(0, 1)
        return (weights @ v).transpose(1, 2).flatten(2)

    chosen = set().union(*(select(one.sites, sites) for one in CROSS_IMAGE.steps))
    for site in sites:
        if site.name in chosen:
            clone.set_model_attn1_replace(attend, site.part, site.number, site.index)
    return clone


def _swapped(x: Tensor, source: int, rows: int) -> Tensor:
    """The output's rows, the first third, become those of another picture."""
    return torch.cat((x[source * rows : (source + 1) * rows], x[rows:]))


def _with_companions(model: Patcher, references: Sequence[Reference]) -> Patcher:
    """A clone that evaluates every row again for each reference, and gives the output's rows back."""

    copies = 1 + len(references)

    def noisy(one: Reference, sigma: float) -> Tensor:
        return model.model.process_latent_in(one.latent) + sigma * one.noise()

    def evaluate(apply: Any, arguments: dict) -> Tensor:
        x, t, given = arguments["input"], arguments["timestep"], arguments["c"]
        companions = [noisy(one, float(t[0])).to(x).expand(len(x), -1, -1, -1) for one in references]
        options = dict(given["transformer_options"])
        options |= {name: options[name] * copies for name in ("cond_or_uncond", "uuids")}
        more = {name: torch.cat([one] * copies) for name, one in given.items() if isinstance(one, Tensor)}
        out = apply(torch.cat((x, *companions)), t.repeat(copies), **{**given, **more, "transformer_options": options})
        return out[: len(x)]

    clone = model.clone()
    clone.set_model_unet_function_wrapper(evaluate)
    return clone


def _name(extra: dict) -> str:
    part, number = extra["block"][:2]
    return f"{part}.{number}.{extra['block_index']}"
