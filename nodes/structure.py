"""Self-Similarity Guidance: the forming picture is led to the layout of another, whatever its colours."""

from __future__ import annotations

from comfy_api.latest import io

from ..inversion_core.features import FeatureExtractor as Extractor
from ..inversion_core.hosts.comfy_structure import StructureGuidance, attach
from ..inversion_core.injection import Window
from .features import seeing
from .host import single_image
from .newer import found_by
from .sockets import FeatureExtractor
from .widgets import share, window


class SelfSimilarityGuidance(io.ComfyNode):
    """MODEL, IMAGE, FEATURES and VAE -> MODEL; works with the stock KSampler, on UNets and DiTs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearanceSelfSimilarityGuidance",
            **found_by("splice", "structure guidance", "shape guidance"),
            display_name="Self-Similarity Guidance",
            category="shape & appearance",
            description=(
                "While sampling, the picture the model has in mind is led step by step to the layout of the shape "
                "picture. It reads nothing inside the model, so it works with any, and beside KV Injection."
            ),
            inputs=[
                io.Model.Input("model", tooltip="Any latent image model."),
                io.Image.Input("shape", tooltip="One picture, whose layout is wanted. Resized to the result."),
                FeatureExtractor.Input("features", tooltip="From Load Feature Extractor; a backbone, not CLIP_VISION."),
                io.Vae.Input(
                    "vae",
                    tooltip="The model's, or a small one of the same latents (taesd in Load VAE): much cheaper.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Length of a step; it means the same on every model. Raise it until the outline follows; "
                    "too much brings noise. 0 is exactly the model without this node.",
                ),
                *window(
                    0.0,
                    "Where in the sampling it begins; the layout is decided early.",
                    0.8,
                    "Where it ends, so that the model itself finishes the picture.",
                ),
                io.Int.Input(
                    "repeats",
                    default=1,
                    min=1,
                    max=20,
                    tooltip="Steps at each evaluation of the model: 3 follow the outline more closely than 1. Each "
                    "costs a decoding and its gradient.",
                ),
                share(
                    "appearance_weight",
                    0.0,
                    "How much the look of the appearance picture counts besides. 0: not at all.",
                ),
                *seeing(),
                io.Image.Input(
                    "appearance", optional=True, tooltip="One picture, whose look counts with 'appearance_weight'."
                ),
            ],
            outputs=[io.Model.Output(tooltip="The patched model, for the KSampler. The one put in is unchanged.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        shape,
        features: Extractor,
        vae,
        strength,
        start_percent,
        end_percent,
        repeats,
        appearance_weight,
        block,
        size,
        appearance=None,
    ) -> io.NodeOutput:
        layout = single_image(shape, "the shape").movedim(-1, 1)
        look = None if appearance is None else single_image(appearance, "the appearance").movedim(-1, 1)
        guidance = StructureGuidance(
            features,
            vae,
            layout,
            strength,
            Window(start_percent, end_percent),
            repeats,
            look,
            appearance_weight,
            block,
            size or None,
        )
        return io.NodeOutput(attach(model, guidance))
