"""What every ComfyUI host needs of references: their passes through the model, and the bank that all runs share."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ..bank import BankKey, ReferenceBank
from ..fingerprint import digest, weights_fingerprint
from ..reference import Reference
from .base import HostError
from .report import Report
from .session import States

BANK = ReferenceBank(device_budget=1 << 30, ram_budget=2 << 30)
"""Shared by all runs in this process: the next seed, prompt or queue entry finds what an earlier one computed."""

_PLACED = frozenset(
    (
        "area",
        "mask",
        "mask_strength",
        "start_percent",
        "end_percent",
        "control",
        "control_apply_to_uncond",
        "gligen",
        "default",
        "hooks",
        "concat_latent_image",
        "concat_mask",
        "reference_latents",
        "context_latents",
        "time_dim_concat",
    )
)
"""What places a prompt in the picture or in time, or comes of a picture: the reference's pass goes without."""

_TOKENS: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


@dataclass
class ReferencePasses:
    """The references of one run.

    Args:
        guider: ComfyUI's guider of the run: its model and its prompts.
        record: given the names wanted and a dictionary to fill, the transformer options that record a pass.
        report: counts the passes.
    """

    guider: Any
    record: Callable[[frozenset[str], States], dict[str, Any]]
    report: Report
    _model: str = field(init=False)
    _conds: dict[tuple[str, int], tuple[list, str]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._model = model_key(self.guider.model_patcher)

    def states(self, base: Any, reference: Reference, names: frozenset[str], sigma: float, like: Tensor) -> States:
        """What the model sees in a reference at this sigma: from the bank, or from one pass that fills it."""
        if not names:
            return {}
        conds, described = self._conditioning(base, reference, like)
        key = BankKey(self._model, reference.content, described, sigma)
        states = BANK.get(key, names, like.device)
        if states is not None:
            self.report.hits += 1
            return states
        started = time.perf_counter()
        states = self._pass(base, reference, conds, names, sigma, like)
        BANK.put(key, states)
        self.report.reference_rows += 1
        self.report.reference_seconds += time.perf_counter() - started
        return states

    @torch.no_grad()
    def _pass(
        self, base: Any, reference: Reference, conds: list, names: frozenset[str], sigma: float, like: Tensor
    ) -> States:
        latent = base.process_latent_in(as_latent(base, reference.latent).to(like.device, torch.float32))
        level = torch.full((1,), sigma, device=like.device, dtype=torch.float32)
        noise = as_latent(base, reference.noise_at(sigma)).to(latent)
        noisy = base.model_sampling.noise_scaling(level.view([1] * latent.ndim), noise, latent)
        states: States = {}
        options = {"transformer_options": self.record(names, states)}
        hooks = base.current_patcher.current_hooks
        try:
            comfy.samplers.calc_cond_batch(base, [conds], noisy.to(like.dtype), level, options)
        finally:  # the pass took a prompt's own LoRA out of the weights, and the picture's evaluation is still to come
            base.current_patcher.apply_hooks(hooks)
        return states

    def _conditioning(self, base: Any, reference: Reference, like: Tensor) -> tuple[list, str]:
        """The conditioning of the reference's pass, made ready for its size once a run, and its digest."""
        key = reference.content, id(reference.conditioning)
        if key not in self._conds:
            if reference.conditioning is not None:
                conds = comfy.sampler_helpers.convert_cond(reference.conditioning)
            else:
                originals = self.guider.original_conds
                conds = [dict(cond) for cond in originals.get("negative") or originals["positive"]]
            conds = [{name: cond[name] for name in cond if name not in _PLACED} for cond in conds[:1]]
            described = _describe(conds)
            noise = torch.zeros_like(as_latent(base, reference.latent), device=like.device)
            ready = comfy.samplers.process_conds(base, noise, {"positive": conds}, noise.device)
            self._conds[key] = ready["positive"], described
        return self._conds[key]


def as_latent(base: Any, image: Tensor) -> Tensor:
    """A reference's (1, C, h, w) as this model's latents are: for a model of videos, (1, C, 1, h, w)."""
    return image.unsqueeze(2) if base.latent_format.latent_dimensions == 3 else image


def require_own_trajectory(reference: Reference, base: Any) -> None:
    """Raise HostError if a reference's inversion was made in another model's latent space."""
    if reference.trajectory is None:
        return
    expected = base.process_latent_in(as_latent(base, reference.latent.float())).cpu().reshape(reference.latent.shape)
    if not torch.allclose(reference.trajectory.clean, expected, rtol=1e-2, atol=1e-2):
        raise HostError(
            f"this reference was inverted with another kind of model than this one ({type(base).__name__}): "
            "connect the model that samples to Invert Reference"
        )


def model_key(patcher: comfy.model_patcher.ModelPatcher) -> str:
    """Equal as long as a model and what is patched into its weights and objects stay the same, within this process."""
    parts = [str(patcher.patches_uuid)]
    for kind in ("object_patches", "weight_wrapper_patches", "injections"):
        for name, value in sorted(getattr(patcher, kind, {}).items()):
            values = value if isinstance(value, list) else [value]
            parts.append(f"{kind}.{name}=" + ",".join(_token(one) for one in values))
    return " ".join(parts)


def save_cache(patcher: comfy.model_patcher.ModelPatcher, path: Path) -> int:
    """Write what a model saw in its references; how many passes that were.

    Raises:
        ValueError: it has seen none.
        HostError: what is patched into the model has no content that could be recognised later.
    """
    return BANK.save(path, model_key(patcher), _fingerprint(patcher), _name(patcher))


def load_cache(patcher: comfy.model_patcher.ModelPatcher, path: Path) -> int:
    """Read what `save_cache` wrote; how many passes are saved by it.

    Raises:
        ValueError: the file is damaged or of another model.
        HostError: as of `save_cache`.
    """
    return BANK.load(path, model_key(patcher), _fingerprint(patcher), _name(patcher))


def _name(patcher: comfy.model_patcher.ModelPatcher) -> str:
    return type(patcher.model).__name__


def _fingerprint(patcher: comfy.model_patcher.ModelPatcher) -> str:
    """Content of the unpatched weights and of every patch: the same after a restart, and nowhere else."""
    weights = {k: v for k, v in patcher.model.state_dict().items() if isinstance(v, Tensor)}
    weights |= {k: backup.weight for k, backup in patcher.backup.items() if k in weights}
    if patcher.object_patches or getattr(patcher, "weight_wrapper_patches", None):
        raise HostError(
            "this model is patched beyond its weights (model sampling, weight wrappers), and such a patch cannot be "
            "recognised after a restart: save and load caches before the node that does it"
        )
    try:
        patches = digest({key: _contents(value) for key, value in sorted(patcher.patches.items())})
    except TypeError as error:
        raise HostError(f"a LoRA of this model has a form that cannot be recognised after a restart: {error}") from None
    return digest([weights_fingerprint(weights), patches])


def _contents(value: Any) -> Any:
    """A patch as containers of tensors and numbers; ComfyUI's weight adapters by their weights."""
    if isinstance(value, list | tuple):
        return [_contents(one) for one in value]
    adapter = getattr(value, "weights", None)
    return [type(value).__name__, _contents(adapter)] if adapter is not None else value


def _token(value: Any) -> str:
    """A name for an object that no other object ever gets in this process, as `id` alone would not be."""
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Tensor):  # its == is no bool
        return _describe(value)
    try:
        return _TOKENS.setdefault(value, uuid.uuid4().hex)
    except TypeError:  # neither hashable nor weakly referable: by content, else good for this once
        return _describe(value)


def _describe(value: Any) -> str:
    """A digest by content; what has none (a ControlNet, say) makes the value equal to nothing, itself included."""
    try:
        return digest(_without_names(value))
    except TypeError:
        return uuid.uuid4().hex


def _without_names(conds: Any) -> Any:
    """Conditionings without what ComfyUI draws at random or derives again for every run."""
    if not isinstance(conds, list):
        return conds
    return [{k: v for k, v in cond.items() if k not in ("uuid", "model_conds")} for cond in conds]
