"""KV Injection on any of ComfyUI's models that it knows: which host a model needs is told by its class."""

from __future__ import annotations

from typing import Any

import comfy.model_patcher

from ..injection import Injection
from ..sites import Site, select
from . import comfy_run
from .comfy_dit import DiTRun
from .comfy_run import Run, last_report
from .comfy_unet import UNetRun
from .families import family_of, is_transformer

__all__ = ["attach", "chosen", "last_report", "of_transformer", "sites_of"]


def attach(model: comfy.model_patcher.ModelPatcher, *injections: Injection) -> comfy.model_patcher.ModelPatcher:
    """A clone of the model with further injections; the model itself is not touched.

    Raises:
        HostError: the model is of no known family, a reference has another number of latent channels, or an injection
            asks for what this kind of model has not.
        ValueError: an injection's sites mean nothing on this model.
    """
    return comfy_run.attach(model, _host(model.model.diffusion_model), injections)


def of_transformer(model: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether the model is a diffusion transformer of a known family."""
    return is_transformer(model.model.diffusion_model)


def sites_of(model: comfy.model_patcher.ModelPatcher) -> list[Site]:
    """The model's self-attentions, in the order in which they run.

    Raises:
        HostError: the model is of no known family.
    """
    unet = model.model.diffusion_model
    return _host(unet).sites_of(unet)


def chosen(model: comfy.model_patcher.ModelPatcher, rules: str) -> frozenset[str]:
    """The names of the sites that rules mean on the model; see `sites.select`.

    Raises:
        HostError: the model is of no known family.
        ValueError: a rule that means nothing.
    """
    unet = model.model.diffusion_model
    return select(family_of(unet).rules(rules) if is_transformer(unet) else rules, sites_of(model))


def _host(model: Any) -> type[Run]:
    return DiTRun if is_transformer(model) else UNetRun
