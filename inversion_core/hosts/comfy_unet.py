"""ComfyUI's UNet models (SD1.x, SD2.x, SDXL, the demo model): injections on the stock samplers.

Inside a run, `attn1_patch` appends the references' hidden states to the tokens of the call, so that they go through
the model's own projections (LoRA, fp8 and offload keep working), and `optimized_attention_override` takes q, k and v
apart again and hands them to the operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import comfy.model_patcher
from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample
from torch import Tensor

from ..attention import Attend
from ..injection import Injection
from ..sites import Part, Site
from . import comfy_run
from .base import Grid, tokens_to_map
from .comfy_attention import Options, Override, Replacement, follow
from .comfy_run import KEY, Given, Run, last_report
from .families import unknown
from .session import FEATURES, AttentionCall, Layer, Rows, Session, States

__all__ = ["KEY", "UNetRun", "attach", "last_report", "sites_of"]


def attach(model: comfy.model_patcher.ModelPatcher, *injections: Injection) -> comfy.model_patcher.ModelPatcher:
    """A clone of the model with further injections; see `comfy_run.attach`."""
    return comfy_run.attach(model, UNetRun, injections)


def sites_of(unet: Any) -> list[Site]:
    """The model's self-attentions, in the order in which they run.

    Raises:
        HostError: the model is not one of ComfyUI's image UNets.
    """
    return [site for site, _ in _walk(unet)]


def _walk(unet: Any) -> Iterator[tuple[Site, Any]]:
    """Each self-attention's place and layer."""
    if not isinstance(unet, UNetModel) or any(isinstance(one, SpatialVideoTransformer) for one in unet.modules()):
        raise unknown(unet)
    scale = 1
    parts: tuple[tuple[Part, Any], ...] = (
        ("input", unet.input_blocks),
        ("middle", [unet.middle_block]),
        ("output", unet.output_blocks),
    )
    for part, blocks in parts:
        for number, block in enumerate(blocks):
            for module in block:
                if isinstance(module, Downsample):
                    scale *= 2
                elif isinstance(module, Upsample):
                    scale //= 2
                elif isinstance(module, SpatialTransformer):
                    for index, transformer in enumerate(module.transformer_blocks):
                        if transformer.disable_self_attn:  # its attn1 reads the prompt
                            continue
                        yield Site(part, number, index, scale), transformer.attn1


@dataclass
class UNetRun(Run):
    """One sampling run with a UNet."""

    _layers: dict[str, Layer] = field(default_factory=dict, init=False)
    _feature_block: int = field(default=0, init=False)
    _patches: list = field(default_factory=list, init=False)
    _taken: dict[tuple, bool] = field(default_factory=dict, init=False)
    _call: AttentionCall | None = field(default=None, init=False)

    @classmethod
    def sites_of(cls, model: Any) -> list[Site]:
        return sites_of(model)

    def new_session(self) -> Session:
        places = list(_walk(self.model))
        self._layers = {site.name: Layer(attn.to_q, attn.to_k, attn.heads) for site, attn in places}
        self._feature_block = min(site.number for site, _ in places if site.part == "output") + 1
        return Session(self.injections, [site for site, _ in places])

    def leave(self) -> None:
        self._call = None

    def hooked(self, options: Options, given: Given) -> Options:
        patches, replaced = dict(options.get("patches", {})), options.get("patches_replace", {})
        self._patches = patches.get("attn1_patch", [])
        patches["attn1_patch"] = [self.attn1_patch]
        patches["output_block_patch"] = [*patches.get("output_block_patch", []), self.output_block_patch]
        owners = replaced.get("attn1", {})
        standing = self.guider.model_options["transformer_options"].get("patches_replace", {}).get("attn1", {})
        self._taken = {place: standing.get(place) is not owner for place, owner in owners.items()}
        ours = {place: one if self._taken[place] else Replacement(self, one) for place, one in owners.items()}
        return {
            **options,
            "patches": patches,
            "patches_replace": {**replaced, "attn1": ours},
            "optimized_attention_override": Override(self, options.get("optimized_attention_override")),
        }

    def recording(self, names: frozenset[str], states: States) -> Options:
        def self_attention(n: Tensor, context: Tensor, value: Tensor, extra: Options) -> tuple:
            if _site(extra) in names:
                states[_site(extra)] = tokens_to_map(n, _grid(extra))
            return n, context, value

        def decoder_block(h: Tensor, skip: Tensor, options: Options) -> tuple:
            if FEATURES in names and options["block"][1] == self._feature_block:
                states[FEATURES] = h
            return h, skip

        return {"patches": {"attn1_patch": [self_attention], "output_block_patch": [decoder_block]}}

    # --- inside the model ---------------------------------------------------------------------------------------------

    def output_block_patch(self, h: Tensor, skip: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        """Blend the shape references' features into what enters the block after the first with self-attention."""
        if options["block"][1] == self._feature_block:
            h = self.session.features(h, self._rows(h, options))
        return h, skip

    def attn1_patch(self, n: Tensor, context: Tensor, value: Tensor, extra: Options) -> tuple[Tensor, Tensor, Tensor]:
        """Append the references' hidden states to the tokens of this self-attention."""
        site = _site(extra)
        layer = None if self._left_alone(extra) else self._layers.get(site)
        call = None if layer is None else self.session.prepare(site, n, _grid(extra), self._rows(n, extra), layer)
        self._call = call
        if call is None:
            for patch in self._patches:
                n, context, value = patch(n, context, value, extra)
            return n, context, value
        value = call.hidden if value is n else value
        context = call.hidden if context is n else context
        hidden, carried = call.hidden, call.carried
        for patch in self._patches:
            hidden, context, value, carried = follow(patch, hidden, context, value, carried, extra)
        return call.join(hidden, context, value, carried)

    def _left_alone(self, extra: Options) -> bool:
        """Whether a pack took this attention over for this evaluation only, as perturbed-attention guidance does: what
        it computes there need not be an attention at all."""
        block, number = extra["block"][:2]
        place = (block, number, extra["block_index"])
        return self._taken.get(place, self._taken.get((block, number), False))

    @property
    def pending(self) -> bool:
        """Whether the attention call that comes next was prepared."""
        return self._call is not None

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """The prepared call, edited."""
        call, self._call = self._call, None
        assert call is not None
        return call.attention(q, k, v, attend)

    def _rows(self, x: Tensor, options: Options) -> list[Rows]:
        return self.rows(x.shape[0], Grid(*options["original_shape"][-2:]), options)


def _site(extra: Options) -> str:
    part, number = extra["block"][:2]
    return f"{part}.{number}.{extra['block_index']}"


def _grid(extra: Options) -> Grid:
    return Grid(*extra["activations_shape"][-2:])
