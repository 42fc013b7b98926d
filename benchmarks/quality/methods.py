"""The methods. Each makes one picture of a pair with the demo model, at the same steps and from the same noise.

Which of them are judged, with which values, stands in `groups`. A change of the code here makes all pictures anew;
methods that need more than this (such as a training) are better kept in a module of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import comfy.sample
import torch
import torch.nn.functional as functional
from torch import Tensor

from demo.generate import encode_prompts
from demo.model import DemoModel
from demo.vit import BACKBONE
from demo.weights import FOLDER
from inversion_core.correspondence import CorrespondenceBank, Matching
from inversion_core.cross_feature import cross_feature, matches
from inversion_core.features import Backbone, TimmExtractor, load
from inversion_core.hosts import comfy_color, comfy_injection
from inversion_core.hosts.comfy_color import ColorGuidance
from inversion_core.hosts.comfy_references import BANK
from inversion_core.injection import Window
from inversion_core.presets import Preset
from inversion_core.reference import Reference

from .pairs import Pair, batch

STEPS = 20
CFG = 3.0


class Result(NamedTuple):
    """A picture (H, W, 3) in [0, 1], the rows that went through the network for it, and the seconds it took.

    `untouched`: the share of pixels outside the feathered mask that are C's, bit for bit, where it was placed on C.
    """

    picture: Tensor
    rows: int
    seconds: float
    untouched: float | None = None


Method = Callable[["Studio", Pair], Result]


@dataclass
class Studio:
    """The demo model and what several methods need of a pair."""

    demo: DemoModel
    pairs: CorrespondenceBank = field(default_factory=CorrespondenceBank)
    _references: dict[tuple[int, str], Reference] = field(default_factory=dict)

    @cached_property
    def see(self) -> TimmExtractor:
        """The demo's ViT."""
        backbone = Backbone(**BACKBONE)
        return TimmExtractor(load(backbone, FOLDER / backbone.file), backbone)

    def reference(self, pair: Pair, role: str) -> Reference:
        """A reference of a pair with its mask: "a", "flat a" (its inside one colour, as `flatten` makes it) or "b"."""
        key = (pair.seed, role)
        if key not in self._references:
            rendered = pair.appearance if role == "b" else pair.shape
            picture = batch(rendered)
            if role == "flat a":
                inside = torch.from_numpy(rendered.mask)[None, ..., None]
                mean = (picture * inside).sum((1, 2), keepdim=True) / inside.sum()
                picture = picture.lerp(mean.expand_as(picture), inside)
            latent = self.demo.vae.encode(picture).detach().to("cpu", torch.float32).clone()
            mask = torch.from_numpy(rendered.mask)[None, None]
            on_grid = torch.nn.functional.interpolate(mask, size=latent.shape[-2:], mode="area")
            self._references = {k: v for k, v in self._references.items() if k[0] == pair.seed}
            self._references[key] = Reference(
                latent, on_grid, picture=torch.from_numpy(rendered.image)[None].movedim(-1, 1)
            )
        return self._references[key]

    def sample(
        self,
        pair: Pair,
        prompt: str,
        *,
        model: Any = None,
        cfg: float = CFG,
        negative: str = "",
        denoise: float = 1.0,
        inside: tuple[Tensor, Tensor] | None = None,
    ) -> Result:
        """One picture by the stock sampler; from A's own latent where `denoise` is below 1. Rows are counted.

        `inside`: a latent, and the mask (1, 1, H, W) outside which it is kept.
        """
        rows = 0

        def count(module: Any, args: tuple) -> None:
            nonlocal rows
            rows += args[0].shape[0]

        latent = torch.zeros(1, 4, 16, 16)
        if denoise < 1:
            latent = self.reference(pair, "a").latent
        if inside is not None:
            latent = inside[0]
        hook = self.demo.model.model.diffusion_model.register_forward_pre_hook(count)
        BANK.clear()  # every method pays for its references
        started = time.perf_counter()
        try:
            samples = comfy.sample.sample(
                model or self.demo.model,
                comfy.sample.prepare_noise(latent, pair.seed),
                STEPS,
                cfg,
                "euler",
                "normal",
                encode_prompts(self.demo, [prompt]),
                encode_prompts(self.demo, [negative]),
                latent,
                denoise=denoise,
                noise_mask=None if inside is None else inside[1],
                disable_pbar=True,
                seed=pair.seed,
            )
            picture = self.demo.vae.decode(samples)[0]
        finally:
            hook.remove()
        return Result(picture.float().cpu(), rows, time.perf_counter() - started)


def neutral(pair: Pair) -> str:
    """What every composition is prompted with: the place, and that there is something."""
    return f"a shape on {pair.a.background}"


def described(pair: Pair) -> str:
    """All that words can say of the answer but the shape's name, which the model never learned."""
    return f"a {pair.b.appearance.colour} {pair.b.appearance.texture} shape on {pair.a.background}"


def shown(which: str, studio: Studio, pair: Pair) -> Result:
    """One of the pair's own pictures."""
    return Result(torch.from_numpy(getattr(pair, which).image), 0, 0.0)


def prompted(words: Callable[[Pair], str], studio: Studio, pair: Pair, denoise: float = 1.0) -> Result:
    """Words alone; from A's picture where `denoise` is below 1."""
    return studio.sample(pair, words(pair), denoise=denoise)


def injected(
    preset: Preset,
    studio: Studio,
    pair: Pair,
    *,
    color: float = 1.0,
    cfg: float = CFG,
    shape: Literal["a", "flat a"] | None = "a",
    words: Callable[[Pair], str] = neutral,
) -> Result:
    """A preset on a pair, with its colour step, as the node KV Injection does it.

    Only Cross-Image Attention steers with cfg from the plain to the edited prediction: both its prompts are the same.
    """
    prompt, model = words(pair), _patched(preset, studio, pair, color, shape)
    return studio.sample(pair, prompt, model=model, cfg=cfg, negative=_negative(preset, prompt))


def _negative(preset: Preset, prompt: str) -> str:
    return prompt if preset.name == "cross-image" else ""


def _patched(preset: Preset, studio: Studio, pair: Pair, color: float, shape: Literal["a", "flat a"] | None) -> Any:
    """The model with the preset and its colour step."""
    a, b = studio.reference(pair, "a"), studio.reference(pair, "b")
    layout = None if shape is None else studio.reference(pair, shape)
    transformer = comfy_injection.of_transformer(studio.demo.model)
    model = comfy_injection.attach(studio.demo.model, *preset.injections([b], layout, transformer=transformer))
    if preset.color is None or color == 0:
        return model
    guidance = ColorGuidance(b, strength=color, window=preset.color, mask=a.mask, required=False)
    return comfy_color.attach(model, guidance)


def placed(
    preset: Preset, studio: Studio, pair: Pair, *, room: int, feather: int, shape: Literal["a", "flat a"] = "flat a"
) -> Result:
    """A preset's object on C inside a mask, laid over C through the feathered mask, as the workflow does it.

    `room`: pixels by which the mask grows beyond the shape; `feather`: pixels over which it then fades.
    """
    place = torch.from_numpy(pair.place)[None]
    mask = torch.from_numpy(pair.shape.mask)[None]
    grown = functional.max_pool2d(mask, 2 * room + 1, 1, room)
    latent = studio.demo.vae.encode(place).detach().to("cpu", torch.float32).clone()
    prompt = f"a shape on {pair.c.background}"
    model = _patched(preset, studio, pair, 1.0, shape)
    made = studio.sample(pair, prompt, model=model, negative=_negative(preset, prompt), inside=(latent, grown[None]))
    soft = _feathered(grown, feather)[0, ..., None]
    picture = place[0] * (1 - soft) + made.picture * soft
    outside = soft[..., 0] == 0
    return made._replace(picture=picture, untouched=float((picture == place[0]).all(-1)[outside].float().mean()))


def _feathered(mask: Tensor, feather: int) -> Tensor:
    """(1, H, W) blurred by a Gaussian that ends after so many pixels."""
    at = torch.arange(-feather, feather + 1.0)
    kernel = torch.exp(-0.5 * (at / (feather / 2)) ** 2)
    kernel = kernel / kernel.sum()
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        weights = kernel.reshape(shape)
        around = [feather if weights.shape[3] > 1 else 0] * 2 + [feather if weights.shape[2] > 1 else 0] * 2
        mask = functional.conv2d(functional.pad(mask[None], around, mode="replicate"), weights)[0]
    return mask


def autoencoded(studio: Studio, pair: Pair) -> Result:
    """The true answer, coded and decoded: no method on latents can be nearer."""
    truth = torch.from_numpy(pair.truth.image)[None]
    return Result(studio.demo.vae.decode(studio.demo.vae.encode(truth))[0].float().cpu(), 0, 0.0)


def crossed(
    preset: Preset,
    studio: Studio,
    pair: Pair,
    *,
    matching: Matching | None = None,
    share: float = 1.0,
    end: float = 0.5,
    shape: Literal["a", "flat a"] = "a",
    shape_end: float | None = None,
    words: Callable[[Pair], str] = neutral,
) -> Result:
    """Cross-Feature Attention on a pair, with the colour step of a preset, as its node does it.

    `shape_end`: when the shape is let go, where that is not to be as usual.
    """
    a, b = studio.reference(pair, shape), studio.reference(pair, "b")
    found = matches(studio.see, a, [b], matching or Matching(), studio.pairs)
    injection = cross_feature([b], a, found, share=share, window=Window(0.0, end))
    if shape_end is not None:
        injection = replace(injection, shape_window=Window(0.0, shape_end))
    assert preset.color is not None
    guidance = ColorGuidance(b, window=preset.color, mask=a.mask, required=False)
    model = comfy_color.attach(comfy_injection.attach(studio.demo.model, injection), guidance)
    return studio.sample(pair, words(pair), model=model)


def colored(studio: Studio, pair: Pair) -> Result:
    """AdaIN Color Guidance without any injection."""
    guidance = ColorGuidance(studio.reference(pair, "b"), mask=studio.reference(pair, "a").mask)
    return studio.sample(pair, neutral(pair), model=comfy_color.attach(studio.demo.model, guidance))
