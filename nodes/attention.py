"""KV Injection and its presets: the appearance of some references, the shape of another, while sampling."""

from __future__ import annotations

from typing import Any, Literal

from comfy_api.latest import io, ui
from torch import Tensor

from ..inversion_core.attention import AttentionEdit
from ..inversion_core.hosts import comfy_color
from ..inversion_core.hosts.comfy_color import ColorGuidance
from ..inversion_core.hosts.comfy_injection import attach, chosen, of_transformer, sites_of
from ..inversion_core.injection import Window
from ..inversion_core.presets import PRESETS, Step
from ..inversion_core.presets import Preset as PresetValue
from ..inversion_core.reference import Reference as Value
from .host import output_mask, single_reference
from .newer import found_by, rarely_changed
from .sockets import Preset, Reference
from .widgets import method_strength, share, window

_SOURCES = "\n".join(f"{preset.name}: {preset.source}" for preset in PRESETS.values())


class KVInjection(io.ComfyNode):
    """MODEL and REFERENCEs -> MODEL; works with the stock KSampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearanceKVInjection",
            **found_by(
                "style transfer",
                "appearance transfer",
                "shape and appearance",
                "composition",
                "masactrl",
                "cross-image attention",
                "style aligned",
                "visual style prompting",
                "styleid",
                "ctrl-x",
            ),
            display_name="KV Injection",
            category="shape & appearance",
            description=(
                "While sampling, self-attention reads keys and values of the appearance reference, and the layout "
                "follows the shape reference. No training. Each reference costs one extra row a step, the first time."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="SD1.x, SD2.x, SDXL, Flux, Chroma, SD3, Qwen-Image, Wan, Lumina2, Z-Image or a demo model.",
                ),
                Reference.Input("appearance", tooltip="Whose colours and textures the result takes; may be several."),
                Reference.Input("shape", optional=True, tooltip="Whose outline and layout the result keeps."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="default",
                    tooltip=f"Which method. 'default' is the best we know.\n{_SOURCES}",
                ),
                method_strength(),
                share(
                    "shape_strength",
                    1.0,
                    "How closely the layout follows the shape reference. 1 keeps the outline; lower it if the shape "
                    "picture's own light and dark show through.",
                ),
                share(
                    "color",
                    1.0,
                    "How much of the colours is matched besides, where the method does that (default, cross-image, "
                    "visual-style, style-id). Lower it if the result looks tinted; 0 leaves it to the attention.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the result may change. Resized to the latent. Without it, everywhere.",
                ),
                Preset.Input("custom", optional=True, tooltip="From Custom Preset: used instead of the one chosen."),
                share(
                    "shape_end_percent",
                    1.0,
                    "Where the shape is let go at the latest; 1 leaves it to the method. 0.8 brings more of the "
                    "appearance's texture and a looser outline, which a learned shape makes up for.",
                    optional=True,
                    **rarely_changed(),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The patched model, for the KSampler. The one put in is unchanged.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        appearance,
        preset,
        strength,
        shape_strength,
        color,
        shape=None,
        mask=None,
        custom=None,
        shape_end_percent=1.0,
    ) -> io.NodeOutput:
        method = PRESETS[preset] if custom is None else custom
        layout = None if shape is None else single_reference(shape, "the shape")
        where = output_mask(mask)
        injections = method.injections(
            appearance,
            layout,
            strength=strength,
            shape_strength=shape_strength,
            shape_end=shape_end_percent,
            mask=where,
            transformer=of_transformer(model),
        )
        patched = attach(model, *injections)
        return io.NodeOutput(with_color(patched, method.color, color * strength, appearance[0], layout, where))


def with_color(
    model: Any, window: Window | None, strength: float, appearance: Value, shape: Value | None, mask: Tensor | None
) -> Any:
    """The model with a method's colour step in its window, inside the mask or else the shape's object."""
    if window is None or strength == 0:
        return model
    inside = shape.mask if mask is None and shape is not None else mask
    guidance = ColorGuidance(appearance, strength=strength, window=window, mask=inside, required=False)
    return comfy_color.attach(model, guidance)


class CustomPreset(io.ComfyNode):
    """A method of one's own, from the operator's parts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearanceCustomPreset",
            **found_by("attention sharing", "kv sharing", "own method"),
            display_name="Custom Preset",
            category="shape & appearance",
            description="A method of your own for KV Injection, instead of a published one.",
            inputs=[
                io.Combo.Input(
                    "reference",
                    options=["replace", "extend", "normalise"],
                    default="replace",
                    tooltip="How the appearance enters: its keys and values instead of the picture's own (strongest), "
                    "beside them (mildest), or by its statistics where it would be read (Ctrl-X).",
                ),
                io.String.Input(
                    "sites",
                    default="all",
                    tooltip="Which self-attentions read the appearance: all, encoder, middle, decoder, decoder.coarse, "
                    "decoder.fine, decoder[1:-1]; on transformers (Flux, SD3, ...) all, appearance, double, single, "
                    "early, mid, late; or the model's own blocks such as output.4, double.7; several by commas. "
                    "Connect the model to see its blocks.",
                ),
                *window(
                    0.0,
                    "Where in the sampling the appearance begins to be read.",
                    1.0,
                    "Where it ends. Below 0.6 little of the texture survives.",
                ),
                io.String.Input(
                    "shape_sites",
                    default="",
                    tooltip="Which self-attentions take the shape's layout. Empty means the same as 'sites'.",
                ),
                share(
                    "shape_end_percent",
                    1.0,
                    "Where the shape is let go; earlier leaves the outline looser and the texture freer.",
                ),
                share("shape_query", 1.0, "Share of the shape's queries: 1 keeps the layout, 0.75 is StyleID's."),
                share(
                    "shape_features",
                    1.0,
                    "Share of the shape's features in a UNet's decoder (Ctrl-X, Plug-and-Play). With much of it the "
                    "shape picture's own texture may come along.",
                ),
                io.Float.Input(
                    "contrast",
                    default=1.0,
                    min=1.0,
                    max=10.0,
                    step=0.01,
                    **rarely_changed(),
                    tooltip="Sharpens what is read: 1.67 in Cross-Image Attention; above 2 it becomes noisy. 1 is off.",
                ),
                io.Float.Input(
                    "temperature",
                    default=1.0,
                    min=0.1,
                    max=10.0,
                    step=0.01,
                    **rarely_changed(),
                    tooltip="Multiplies the attention's logits: 1 leaves them, above is sharper (StyleID: 1.5), below "
                    "blurs.",
                ),
                io.Float.Input(
                    "reference_bias",
                    default=0.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    **rarely_changed(),
                    tooltip="With 'extend', how much more the reference counts: 0.69 doubles it (StyleAligned); very "
                    "high reads nothing else.",
                ),
                io.Boolean.Input(
                    "match_statistics",
                    default=False,
                    **rarely_changed(),
                    tooltip="Matches queries and keys to the reference's statistics (StyleAligned).",
                ),
                io.Combo.Input(
                    "rows",
                    options=["all", "positive"],
                    default="all",
                    **rarely_changed(),
                    tooltip="'positive' edits the positive prompt alone, so that cfg leads towards the edit.",
                ),
                io.Model.Input("model", optional=True, tooltip="Shows which of its blocks are chosen."),
                io.Combo.Input(
                    "positions",
                    options=["own", "shared"],
                    default="own",
                    optional=True,
                    **rarely_changed(),
                    tooltip="Where Flux, Chroma, Qwen-Image, Wan, Lumina2 and Z-Image see the appearance: 'own' beside "
                    "the picture, so that nothing is drawn to the same place; 'shared' over it. No effect on others.",
                ),
            ],
            outputs=[Preset.Output(display_name="preset", tooltip="For KV Injection's input 'custom'.")],
        )

    @classmethod
    def execute(
        cls,
        reference,
        sites,
        start_percent,
        end_percent,
        shape_sites,
        shape_end_percent,
        shape_query,
        shape_features,
        contrast,
        temperature,
        reference_bias,
        match_statistics,
        rows,
        model=None,
        positions: Literal["own", "shared"] = "own",
    ) -> io.NodeOutput:
        edit = AttentionEdit(
            reference,
            shape_query=shape_query,
            qk_stats=match_statistics,
            contrast=contrast,
            temperature=temperature,
            reference_bias=reference_bias,
        )
        windows = Window(start_percent, end_percent), Window(0.0, shape_end_percent)
        layout = shape_sites.strip() or None
        step = Step(edit, sites, *windows, layout, shape_features, rows, positions, blocks=sites, shape_blocks=layout)
        preset = PresetValue("custom", "Custom Preset", (step,))
        if model is None:
            return io.NodeOutput(preset)
        read = chosen(model, sites)
        lines = [f"{'x' if site.name in read else '-'} {site.name} (1/{site.scale})" for site in sites_of(model)]
        return io.NodeOutput(preset, ui=ui.PreviewText("\n".join(lines)))
