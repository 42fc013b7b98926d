"""Any of ComfyUI's latent models: steps on the predicted clean latent, one after every evaluation.

A clone of the ModelPatcher carries a post-cfg function, in its place among those of other nodes, and an OUTER_SAMPLE
wrapper that gives each run its own record. Nothing is attached to the shared model, and what a run learns dies with it.
The architecture of the model plays no part, for only its prediction is changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import comfy.model_patcher
import comfy.patcher_extension
import torch
import torch.nn.functional as F
from torch import Tensor

from .base import HostError

KEY = "shape_and_appearance_guidance"
_OUTER = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE


class Sampling(NamedTuple):
    """A run of ComfyUI's samplers: its guider, and its inpainting mask (1 where the picture may change) or None."""

    guider: Any
    keep: Tensor | None


class Record(Protocol):
    """One guidance in one sampling run."""

    def guided(self, denoised: Tensor, sigma: Tensor) -> Tensor:
        """The predicted clean latent (B, C, ...positions) at a noise level, changed or the very tensor."""
        ...

    def finish(self) -> None:
        """The run has ended well; raises HostError if the guidance had no effect in it."""
        ...


class Guidance(Protocol):
    """What an artist asks for; immutable, as clones of a model share it."""

    @property
    def title(self) -> str:
        """The node's name, for errors."""
        ...

    def opened(self, sampling: Sampling) -> Record:
        """A record for a run that starts."""
        ...


def attach(model: comfy.model_patcher.ModelPatcher, guidance: Guidance) -> comfy.model_patcher.ModelPatcher:
    """A clone of the model with one more guidance; the model itself is not touched."""
    clone, hook = model.clone(), _Hook(guidance)
    clone.set_model_sampler_post_cfg_function(hook)
    clone.add_wrapper_with_key(_OUTER, KEY, _OuterSample(hook))
    return clone


def attached(model: comfy.model_patcher.ModelPatcher) -> list[Guidance]:
    """The guidances that a model carries, in the order in which they were attached."""
    return [wrapper.hook.guidance for wrapper in model.get_wrappers(_OUTER, KEY)]


@dataclass(frozen=True, eq=False)
class _OuterSample:
    """Opens the record of a run for one hook, and closes it."""

    hook: _Hook

    def __deepcopy__(self, memo: dict) -> _OuterSample:
        return self

    def __call__(
        self, executor: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        guider = executor.class_obj
        record = self.hook.guidance.opened(Sampling(guider, args[0] if args else kwargs.get("denoise_mask")))
        options = guider.model_options.setdefault("transformer_options", {})
        options[KEY] = {**options.get(KEY, {}), self.hook: record}
        result = executor(noise, latent, sampler, sigmas, *args, **kwargs)
        record.finish()
        return result


@dataclass(frozen=True, eq=False)
class _Hook:
    """The post-cfg function that an attached model carries. Immutable: what changes lives in the run's record."""

    guidance: Guidance

    def __deepcopy__(self, memo: dict) -> _Hook:
        return self

    def __call__(self, args: dict[str, Any]) -> Tensor:
        record = args["model_options"].get("transformer_options", {}).get(KEY, {}).get(self)
        if record is None:
            raise HostError(
                f"{self.guidance.title} was called outside of ComfyUI's sampling (its OUTER_SAMPLE wrapper did not "
                "run): sample with a node that goes through ComfyUI's guider, such as KSampler or SamplerCustom"
            )
        return record.guided(args["denoised"], args["sigma"])


def fit_mask(mask: Tensor, like: Tensor) -> Tensor:
    """A mask at the size of latents (B, C, ..., h, w): one channel, (B or 1, 1, ..., h, w).

    Read as ComfyUI reads noise masks: of (n, H, W) or (n, C, H, W) each is of one picture of the batch, repeated as
    often as it takes; or on video latents of one stretch of its frames.
    """
    flat = mask.to(like.device, torch.float32)
    flat = flat[:, :1] if flat.ndim > 3 else flat.reshape(-1, 1, *flat.shape[-2:])
    if like.ndim == 5 and flat.ndim == 4:
        flat = flat.transpose(0, 1)[None]
    if like.ndim == 4 and flat.ndim == 5:
        flat = flat[:, :, 0]
    size = like.shape[2:] if flat.ndim == 4 or flat.shape[2] > 1 else (1, *like.shape[3:])
    flat = flat if flat.shape[2:] == tuple(size) else F.interpolate(flat, size=size, mode="area")
    rows = like.shape[0]
    return flat if flat.shape[0] in (1, rows) else flat[torch.arange(rows, device=flat.device) % flat.shape[0]]


def percent_of(sampling: Any, sigma: float) -> float:
    """Where in the schedule a noise level lies, by halving: the inverse of ComfyUI's `percent_to_sigma`."""
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        if float(sampling.percent_to_sigma(middle)) > sigma:
            low = middle
        else:
            high = middle
    return (low + high) / 2
