"""Any of ComfyUI's latent image models: the predicted picture is led to the shape image's self-similarity.

At every step of a window the predicted clean latent is decoded, a self-supervised ViT looks at the picture, and the
latent takes a step down the gradient of the structure loss of Splice (arXiv 2201.00424; DiffuseIT, arXiv 2209.15264,
guides a diffusion model with it). The model itself is not differentiated, so its architecture plays no part.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.model_patcher
import torch
import torch.nn.functional as F
from torch import Tensor

from ..features import FeatureExtractor, Features, leave_inference_mode
from ..injection import Window
from ..metrics import self_similarity_loss
from . import comfy_guidance
from .base import HostError, inside
from .comfy_guidance import Sampling

STEP = 0.5
"""Length of one step at strength 1, in shares of the latent's own length."""
GRADIENT_MEMORY = 3
"""What the decoder needs with its graph, in shares of what it needs without."""


@dataclass(frozen=True, eq=False)
class StructureGuidance:
    """Whose self-similarity a prediction is led to, where and when.

    Attributes:
        extractor: what looks at the pictures; it must give gradients.
        vae: ComfyUI's VAE of the model, or a small one of the same latents (TAESD).
        shape: (1, 3, H, W) in [0, 1], whose layout is wanted. Resized to the output.
        strength: 0 or above, length of a step; the same for every model, as gradients are normalised.
        window: when, in sampling percent.
        repeats: steps at each evaluation, 1 or more; each costs a decoding with its gradient.
        appearance: (1, 3, H, W) in [0, 1], whose look (CLS token) is wanted besides; None: nobody's.
        appearance_weight: 0 or above, of its loss (1 - cosine) beside the structure's.
        block, size: as in `FeatureExtractor`.

    Raises:
        ValueError: a value out of range, a CLS term without a picture or a backbone without CLS.
    """

    extractor: FeatureExtractor
    vae: Any
    shape: Tensor
    strength: float = 1.0
    window: Window = field(default_factory=lambda: Window(0.0, 0.8))
    repeats: int = 1
    appearance: Tensor | None = None
    appearance_weight: float = 0.0
    block: int = -1
    size: int | None = None

    def __post_init__(self) -> None:
        for name, picture in (("shape", self.shape), ("appearance", self.appearance)):
            if picture is not None and (picture.ndim != 4 or picture.shape[:2] != (1, 3)):
                raise ValueError(f"the {name} picture is {tuple(picture.shape)}, needed is one (1, 3, H, W)")
        for name in ("strength", "appearance_weight"):
            if not 0 <= getattr(self, name) <= 1e3:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be 0 (off) or above, at most 1000")
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}, but at least 1 step must be made")
        if self.appearance_weight > 0 and (self.appearance is None or not self.extractor.has_cls):
            raise ValueError(
                "appearance_weight is above 0, which needs an appearance picture and a backbone with a CLS token: "
                "connect a picture, choose a backbone such as DINO's, or set it to 0"
            )

    def __deepcopy__(self, memo: dict) -> StructureGuidance:
        return self  # immutable: hosts that copy their options may share it

    @property
    def title(self) -> str:
        return "Self-Similarity Guidance"

    def opened(self, sampling: Sampling) -> _Run:
        return _Run(self, sampling.guider.model_patcher)


def attach(model: comfy.model_patcher.ModelPatcher, guidance: StructureGuidance) -> comfy.model_patcher.ModelPatcher:
    """A clone of the model with one more guidance; the model itself is not touched. Strength 0 attaches nothing.

    Raises:
        HostError: the VAE's latents are not the model's.
    """
    channels, own = model.model.latent_format.latent_channels, guidance.vae.latent_channels
    if channels != own:
        raise HostError(
            f"the VAE decodes latents of {own} channels, but this model ({type(model.model).__name__}) has {channels}: "
            "connect the VAE that belongs to it, or a small one of the same family (TAESD)"
        )
    return model.clone() if guidance.strength == 0 else comfy_guidance.attach(model, guidance)


def last_losses(model: comfy.model_patcher.ModelPatcher) -> list[tuple[float, float]]:
    """Noise level and mean loss before each step of the last run with this patched model; without one, empty."""
    guidances = [one for one in comfy_guidance.attached(model) if isinstance(one, StructureGuidance)]
    return [] if not guidances else [(sigma, float(loss)) for sigma, loss in _LOSSES.get(guidances[-1], [])]


_LOSSES: WeakKeyDictionary[StructureGuidance, list[tuple[float, Tensor]]] = WeakKeyDictionary()


@dataclass
class _Run:
    """One guidance in one sampling run; `patcher` is the run's ModelPatcher."""

    guidance: StructureGuidance
    patcher: Any
    losses: list[tuple[float, Tensor]] = field(default_factory=list)
    _targets: tuple[Features, Features | None] | None = None

    def guided(self, denoised: Tensor, sigma: Tensor) -> Tensor:
        """The predicted clean latent (B, C, h, w), some steps nearer to the shape if the window is open."""
        level = float(sigma.flatten()[0])
        base = self.patcher.model
        if not inside(base.model_sampling, self.guidance.window, level):
            return denoised
        if denoised.ndim != 4:
            raise HostError(
                f"{self.guidance.title} works on pictures, but this model's latents have {denoised.ndim - 2} "
                "dimensions (video)"
            )
        # In the autoencoder's space, so that the model's own scaling needs no gradient.
        latent = base.process_latent_out(denoised.float())
        for _ in range(self.guidance.repeats):
            loss, gradient = self._slope(latent)
            self.losses.append((level, loss))
            unit = gradient / gradient.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-20)
            length = latent.square().mean((1, 2, 3), keepdim=True).sqrt()
            latent = latent - STEP * self.guidance.strength * length * unit
        # Decoder and backbone may have put the model off its device.
        comfy.model_management.load_models_gpu([self.patcher])
        return base.process_latent_in(latent).to(denoised)

    def _slope(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, a scalar on the device, and its gradient (B, C, h, w) with respect to the latent."""
        with torch.inference_mode(False), torch.enable_grad():
            variable = latent.clone().requires_grad_()
            pictures = decode(self.guidance.vae, variable)
            loss = self._loss(pictures)
            (gradient,) = torch.autograd.grad(loss.sum(), variable)
        return loss.detach().mean(), gradient

    def _loss(self, pictures: Tensor) -> Tensor:
        """(B,): of structure, and of appearance where that is asked for."""
        asked = self.guidance
        seen = asked.extractor(pictures, block=asked.block, size=asked.size, grad=True)
        structure, appearance = self._wanted(pictures)
        loss = self_similarity_loss(seen, structure)
        if appearance is not None:
            assert seen.cls_normed is not None and appearance.cls_normed is not None  # asked of the backbone before
            look = F.cosine_similarity(seen.cls_normed.float(), appearance.cls_normed.float(), dim=1)
            loss = loss + asked.appearance_weight * (1 - look)
        return loss

    def _wanted(self, like: Tensor) -> tuple[Features, Features | None]:
        """The features of the shape, at the output's size, and those of the appearance; once a run."""
        if self._targets is None:
            asked = self.guidance
            fitted = F.interpolate(asked.shape.float(), size=like.shape[2:], mode="bicubic", antialias=True)
            structure = asked.extractor(fitted.clamp(0, 1), block=asked.block, size=asked.size)
            look = None
            if asked.appearance is not None and asked.appearance_weight > 0:
                look = asked.extractor(asked.appearance, block=asked.block, size=asked.size)
            self._targets = structure, look
        return self._targets

    def finish(self) -> None:
        """Keep the losses for whoever asks; raise if no step of the run was guided."""
        if not self.losses:
            window = self.guidance.window
            raise HostError(
                f"{self.guidance.title} changed nothing: no step of this run lies between {window.start} and "
                f"{window.end} of the schedule. Widen start and end percent, or check that the sampler's denoise "
                "reaches that part"
            )
        _LOSSES[self.guidance] = self.losses


def decode(vae: Any, latent: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] of latents (B, C, h, w), with a gradient, as ComfyUI's VAE makes them."""
    room = GRADIENT_MEMORY * vae.memory_used_decode(latent.shape, vae.vae_dtype)
    comfy.model_management.load_models_gpu([vae.patcher], memory_required=room)
    leave_inference_mode(vae.first_stage_model)
    decoded = vae.first_stage_model.decode(latent.to(vae.device, vae.vae_dtype))
    return vae.process_output(decoded.float())
