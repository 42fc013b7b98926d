"""KV Injection: the appearance of one reference, the shape of another, while sampling."""

from __future__ import annotations

from comfy_api.latest import io

from ..inversion_core.attention import AttentionEdit
from ..inversion_core.hosts.comfy_unet import attach
from ..inversion_core.injection import Injection, Window
from .host import output_mask
from .sockets import Reference
from .widgets import share


class KVInjection(io.ComfyNode):
    """MODEL and REFERENCEs -> MODEL; works with the stock KSampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearanceKVInjection",
            display_name="KV Injection",
            category="shape & appearance",
            description=(
                "While sampling, the decoder's self-attention reads keys and values of the appearance reference, and "
                "the layout follows the shape reference. No training. Each reference costs one extra row a step."
            ),
            inputs=[
                io.Model.Input("model", tooltip="An SD1.x, SD2.x or SDXL model, or the demo model."),
                Reference.Input("appearance", tooltip="Whose colours and textures the result takes."),
                Reference.Input("shape", optional=True, tooltip="Whose outline and layout the result keeps."),
                share("strength", 1.0, "How much of both is injected. 0 is exactly the model without this node."),
                share("start_percent", 0.0, "Where in the sampling the appearance begins to be read."),
                share("end_percent", 1.0, "Where it ends. Below 0.6 little of the texture survives."),
                share("shape_strength", 1.0, "How closely the layout follows the shape reference."),
                share("shape_end_percent", 0.8, "Where the shape is let go; later keeps the outline tighter."),
                io.Combo.Input(
                    "sites",
                    options=["decoder", "all"],
                    default="decoder",
                    tooltip="Which self-attentions read the references. 'decoder' as published methods do; 'all' holds "
                    "shape and texture tighter, and wants masks on both references.",
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
        strength,
        start_percent,
        end_percent,
        shape_strength,
        shape_end_percent,
        sites,
        shape=None,
        mask=None,
    ) -> io.NodeOutput:
        keep = shape_strength if shape is not None else 0.0
        injection = Injection(
            AttentionEdit(reference="replace", shape_query=keep, strength=strength),
            appearance=appearance,
            window=Window(start_percent, end_percent),
            shape=shape,
            shape_window=Window(0.0, shape_end_percent),
            feature_strength=keep,
            mask=output_mask(mask),
            sites=sites,
        )
        return io.NodeOutput(attach(model, injection))
