"""What the diffusers host needs of references: their noise levels, the conditioning of their passes, the model's name.

A run's own conditioning reaches this module as the keyword arguments of `UNet2DConditionModel.forward`.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..fingerprint import digest, weights_fingerprint
from ..reference import Reference
from .base import HostError

UNetArguments = dict[str, Any]
"""Keyword arguments of `UNet2DConditionModel.forward`."""

_ROWS = ("encoder_hidden_states", "class_labels", "timestep_cond", "added_cond_kwargs", "encoder_attention_mask")
"""What tells the UNet about a prompt, row by row of the batch."""
_SHARED = "cross_attention_kwargs"
"""What is told about all rows together: a LoRA's scale, say."""
_PLACED = ("gligen", "ip_adapter_masks")
"""Cross-attention arguments that place things in the picture: the reference's pass goes without, as it does without a
ControlNet's and an adapter's residuals."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A `Reference.conditioning` for diffusers: what one prompt tells the UNet.

    Attributes:
        embeds: (1, L, C), the first tensor that `pipe.encode_prompt` gives.
        added_cond_kwargs: the UNet's argument of that name, each tensor with one row. SDXL needs `text_embeds` (1, P),
            the pooled embeddings. What is missing is taken from the run; `time_ids` then as the run's own prompts
            have them, see `Passes.arguments`.

    Raises:
        ValueError: more than one prompt.
    """

    embeds: Tensor
    added_cond_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.embeds.ndim != 3 or self.embeds.shape[0] != 1:
            raise ValueError(
                f"a reference's prompt embeddings are {tuple(self.embeds.shape)}, but they must be (1, L, C): "
                "encode one prompt, without its negative"
            )


@dataclass(frozen=True)
class NoiseLevels:
    """A scheduler's sigmas, `sqrt((1 - a) / a)` with `a = alphas_cumprod`, log-linear between the training timesteps.

    The same as ComfyUI's ModelSamplingDiscrete, so that windows of sampling percent mean the same in both.
    """

    log_sigmas: Tensor
    """(T,), float64, on the CPU."""

    @classmethod
    def of(cls, scheduler: Any) -> NoiseLevels:
        """The levels of a diffusers scheduler.

        Raises:
            HostError: the scheduler is not one of diffusion with discrete training timesteps.
        """
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if alphas is None:
            raise HostError(
                f"{type(scheduler).__name__} has no alphas_cumprod, so the noise of a reference cannot be known: use a "
                "scheduler of SD1.x, SD2.x or SDXL, such as EulerDiscreteScheduler or DDIMScheduler"
            )
        # Zero terminal SNR makes the last one 0; diffusers' Euler scheduler puts this number there.
        a = alphas.to("cpu", torch.float64).clamp_min(2**-24)
        return cls(((1 - a) / a).log() / 2)

    def sigma(self, timestep: float) -> float:
        """The noise level that a timestep stands for.

        Raises:
            HostError: the timestep is not one of training.
        """
        last = len(self.log_sigmas) - 1
        if not 0 <= timestep <= last:
            raise HostError(
                f"the UNet was called at timestep {timestep}, but this scheduler's lie between 0 and {last}: use one "
                "that tells the UNet its training timesteps (timestep_type 'discrete')"
            )
        low = math.floor(timestep)
        ends = self.log_sigmas[low], self.log_sigmas[min(low + 1, last)]
        return math.exp(torch.lerp(*ends, timestep - low).item())

    def percent_to_sigma(self, percent: float) -> float:
        """The noise level at this share of the schedule, as ComfyUI counts: everything lies between 0 and 1."""
        if percent <= 0:
            return math.inf
        return 0.0 if percent >= 1 else self.sigma((1 - percent) * (len(self.log_sigmas) - 1))


@dataclass
class Passes:
    """The conditioning of the references' passes in one run.

    Args:
        told: the arguments with which the run called the UNet.
        vae_scale_factor: pixels to a latent cell in each direction.
    """

    told: UNetArguments
    vae_scale_factor: int
    _size: torch.Size = field(init=False)
    _ready: dict[tuple[str, int], tuple[UNetArguments, str]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._size = self.told["sample"].shape
        self.told = {name: self.told.get(name) for name in (*_ROWS, _SHARED)}  # a ControlNet's tensors may go

    def arguments(self, reference: Reference) -> tuple[UNetArguments, str]:
        """What the UNet is told in a reference's pass, and its digest.

        The reference's own `Prompt` if it has one; else the run's first row, which is the negative prompt's wherever
        there is one. SDXL's `time_ids` say the reference's own size where the run's say no more than the run's own
        size (no crop, no other target): so does ComfyUI.

        Raises:
            HostError: the reference's conditioning is none for diffusers.
        """
        key = reference.content, id(reference.conditioning)
        if key not in self._ready:
            made = self._made(reference)
            self._ready[key] = made, _digest(made)
        return self._ready[key]

    def same_prompts(self, told: UNetArguments) -> bool:
        """Whether the UNet is told the very same as in the run's first step, about a picture of the same size."""
        return told["sample"].shape == self._size and all(
            _is_same(told.get(name), value) for name, value in self.told.items()
        )

    def _made(self, reference: Reference) -> UNetArguments:
        made = {name: _first_row(self.told[name]) for name in _ROWS if self.told[name] is not None}
        added = dict(made.get("added_cond_kwargs", {}))
        ids = added.get("time_ids")
        if ids is not None and torch.equal(ids, self._size_ids(self._size, ids)):
            added["time_ids"] = self._size_ids(reference.latent.shape, ids)
        prompt = reference.conditioning
        if prompt is not None:
            if not isinstance(prompt, Prompt):
                raise HostError(
                    f"the reference's conditioning is a {type(prompt).__name__}, but this is a diffusers pipeline: "
                    "give it inversion_core.hosts.diffusers.Prompt(embeds, added_cond_kwargs), or None"
                )
            like = made["encoder_hidden_states"]
            made["encoder_hidden_states"] = prompt.embeds.to(like)
            made.pop("encoder_attention_mask", None)
            added |= {name: _to(value, like) for name, value in prompt.added_cond_kwargs.items()}
        if added:
            made["added_cond_kwargs"] = added
        others = self.told[_SHARED] or {}
        made[_SHARED] = {name: others[name] for name in others if name not in _PLACED}
        return made

    def _size_ids(self, size: torch.Size, like: Tensor) -> Tensor:
        height, width = (side * self.vae_scale_factor for side in size[-2:])
        return torch.tensor([[height, width, 0, 0, height, width]]).to(like)


def model_key(unet: torch.nn.Module, scaling_factor: float, levels: NoiseLevels) -> str:
    """Equal for models that see the same in a reference, as far as weights and LoRAs can tell."""
    return digest([weights_key(unet), scaling_factor, levels.log_sigmas])


def weights_key(model: torch.nn.Module) -> str:
    """Equal for equal weights and LoRAs."""
    try:
        weights = weights_fingerprint(model.state_dict())
    except ValueError:  # offloaded module by module: the weights are somewhere else, and equal to nothing we know
        weights = uuid.uuid4().hex
    loras = [[name, found] for name, one in model.named_modules() if (found := _lora(one)) is not None]
    return digest([weights, loras])


def _lora(module: Any) -> list | None:
    """How strongly the LoRAs in one of peft's layers act, which no weight tells; None for every other layer."""
    if not (hasattr(module, "active_adapters") and hasattr(module, "scaling")):
        return None
    return [list(module.active_adapters), dict(module.scaling), bool(module.disable_adapters)]


def _is_same(a: Any, b: Any) -> bool:
    """By identity of the tensors: their values would have to be waited for."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_is_same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_is_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)


def _first_row(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value[:1]
    if isinstance(value, Mapping):
        return {name: _first_row(one) for name, one in value.items()}
    return [_first_row(one) for one in value]


def _to(value: Any, like: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype if value.is_floating_point() else None)
    return [_to(one, like) for one in value]


def _digest(value: UNetArguments) -> str:
    """By content; what has none (an object of another package) makes the arguments equal to nothing else."""
    try:
        return digest(value)
    except TypeError:
        return uuid.uuid4().hex
