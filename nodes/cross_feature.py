"""Cross-Feature Attention: features say which part of the appearance each part of the result reads."""

from __future__ import annotations

from functools import partial
from typing import Any

from comfy_api.latest import io

from ..inversion_core.correspondence import Matching
from ..inversion_core.cross_feature import See, cross_feature, matches
from ..inversion_core.features import FeatureExtractor as Extractor
from ..inversion_core.hosts.comfy_injection import attach
from ..inversion_core.injection import Refresh, Window
from ..inversion_core.presets import DEFAULT
from .attention import with_color
from .features import PAIRS, matching_inputs, seeing
from .host import output_mask, single_reference
from .newer import found_by, rarely_changed
from .sockets import FeatureExtractor, Reference
from .widgets import method_strength, share, window


class CrossFeatureAttention(io.ComfyNode):
    """MODEL, REFERENCEs and FEATURES -> MODEL; works with the stock KSampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearanceCrossFeatureAttention",
            **found_by("correspondence attention", "dift", "semantic transfer"),
            display_name="Cross-Feature Attention",
            category="shape & appearance",
            description=(
                "Like KV Injection, but a feature extractor, which sees both pictures clean, says which part of the "
                "appearance each part of the result reads. Preview Correspondence shows what it says."
            ),
            inputs=[
                io.Model.Input("model", tooltip="Any model that KV Injection works with."),
                Reference.Input("appearance", tooltip="Whose colours and textures the result takes; may be several."),
                Reference.Input("shape", tooltip="Whose layout the result has, and whose parts are looked for."),
                FeatureExtractor.Input("features", tooltip="From Load Feature Extractor."),
                method_strength(),
                share(
                    "share",
                    1.0,
                    "How much of the reading the features decide, inside their window; 0.5 is half and half with the "
                    "rest.",
                ),
                io.Combo.Input(
                    "rest",
                    options=["queries", "own"],
                    default="queries",
                    tooltip="What decides the rest, and everything outside the window. 'queries': the model itself "
                    "finds the place in the appearance, as in KV Injection. 'own': the appearance is not read there.",
                ),
                *window(
                    0.0,
                    "Where in the sampling the features begin to decide.",
                    0.5,
                    "Where they end. 1 brings more of the appearance's texture; end with AdaIN Color Match then.",
                ),
                io.String.Input(
                    "sites",
                    default="all",
                    **rarely_changed(),
                    tooltip="Which self-attentions: all, encoder, middle, decoder, decoder.coarse, decoder.fine, "
                    "or the model's own blocks; see Custom Preset.",
                ),
                *matching_inputs(**rarely_changed()),
                share("shape_strength", 1.0, "How closely the layout follows the shape besides."),
                share("color", 1.0, "How much of the colours is matched besides, as in KV Injection."),
                *seeing(),
                io.Int.Input(
                    "refresh",
                    default=0,
                    min=0,
                    max=100,
                    **rarely_changed(),
                    tooltip="Look at the forming picture again every so many steps, for a result that does not keep "
                    "the shape's place. Needs the VAE. 0: look at the shape picture only.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="For 'refresh': the model's, or a small one of the same latents (taesd in Load VAE).",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the result may change. Resized to the latent. Without it, everywhere.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The patched model, for the KSampler. The one put in is unchanged.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        appearance,
        shape,
        features: Extractor,
        strength,
        share,
        rest,
        start_percent,
        end_percent,
        sites,
        temperature,
        top_k,
        balance,
        compare,
        shape_strength,
        color,
        block,
        size,
        refresh,
        vae=None,
        mask=None,
    ) -> io.NodeOutput:
        see = partial(features, block=block, size=size or None)
        layout, where = single_reference(shape, "the shape"), output_mask(mask)
        matching = Matching(compare, temperature=temperature, top_k=top_k, balance=balance)
        found = matches(see, layout, appearance, matching, PAIRS)
        injection = cross_feature(
            appearance,
            layout,
            found,
            strength=strength,
            share=share,
            rest=rest,
            window=Window(start_percent, end_percent),
            sites=sites,
            shape_strength=shape_strength,
            mask=where,
            refresh=_refresh(refresh, see, vae, model),
        )
        patched = attach(model, injection)
        return io.NodeOutput(with_color(patched, DEFAULT.color, color * strength, appearance[0], layout, where))


def _refresh(every: int, see: See, vae: Any, model: Any) -> Refresh | None:
    if every == 0:
        return None
    if vae is None:
        raise ValueError(
            f"refresh is {every}, but the forming picture needs a VAE to be seen: connect one, or set it to 0"
        )
    from ..inversion_core.hosts.comfy_vision import features_of_latents

    return Refresh(every, features_of_latents(see, vae, model.model))
