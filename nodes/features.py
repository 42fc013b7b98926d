"""Load Feature Extractor, Preview Features, Preview Correspondence: what belongs to what, and pictures of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from comfy_api.latest import io, ui

from ..inversion_core.correspondence import CorrespondenceBank, Matching
from ..inversion_core.features import BACKBONES, Backbone
from ..inversion_core.features import FeatureExtractor as Extractor
from .feature_files import weights_file
from .feature_preview import correspondence_sheet, features_sheet, warped
from .host import single_image
from .newer import found_by, rarely_changed
from .picture_mask import picture_mask
from .sockets import FeatureExtractor
from .widgets import share

DEMO = "demo-vit"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PAIRS = CorrespondenceBank()
"""The last pairs of pictures, so that what one node has matched another need not match again."""


class LoadFeatureExtractor(io.ComfyNode):
    """A backbone by name, or a CLIP_VISION -> FEATURES."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearanceLoadFeatureExtractor",
            **found_by("dino", "dinov2", "dinov3", "vit", "backbone"),
            display_name="Load Feature Extractor",
            category="shape & appearance",
            description=(
                "Loads a network that sees which parts of pictures belong together. Its file lies in "
                "models/feature_extractors; 'demo-vit' comes with the pack and knows the demo's toy world alone."
            ),
            inputs=[
                io.Combo.Input(
                    "backbone",
                    options=[DEMO, *BACKBONES],
                    default="dinov3-vits16",
                    tooltip="For photographs any of the DINOs. vits are small and fast, vitb and vitl see more; "
                    "scores are usually those of dino-vitb8.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="float32",
                    tooltip="The half precisions halve memory; the smaller backbones hardly need it.",
                ),
                io.Boolean.Input(
                    "download",
                    default=False,
                    tooltip="If the file is missing, fetch it from Hugging Face and check its hash: DINOv3 only, "
                    "under the DINOv3 License. Off: never goes online.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="A CLIP, SigLIP or DINOv2 model from Load CLIP Vision, used instead of the backbone.",
                ),
            ],
            outputs=[FeatureExtractor.Output(display_name="features", tooltip="For previews, scores and guidance.")],
        )

    @classmethod
    def execute(cls, backbone, precision, download, clip_vision=None) -> io.NodeOutput:
        from ..inversion_core.hosts.comfy_vision import ClipVisionExtractor, managed_extractor

        if clip_vision is not None:
            return io.NodeOutput(ClipVisionExtractor(clip_vision))
        chosen, path = _chosen(backbone, download)
        return io.NodeOutput(managed_extractor(chosen, path, PRECISIONS[precision]))


def _chosen(name: str, download: bool) -> tuple[Backbone, Path]:
    if name != DEMO:
        return BACKBONES[name], weights_file(BACKBONES[name], download)
    from ..demo.vit import BACKBONE
    from ..demo.weights import FOLDER

    backbone = Backbone(**BACKBONE)
    return backbone, FOLDER / backbone.file


def seeing() -> list[io.Input]:
    """At which block and how large an extractor looks."""
    return [
        io.Int.Input(
            "block",
            default=-1,
            min=-48,
            max=47,
            **rarely_changed(),
            tooltip="Which block of the backbone; -1 is the last. Earlier ones see finer detail, later ones meaning.",
        ),
        io.Int.Input(
            "size",
            default=0,
            min=0,
            max=2048,
            step=8,
            **rarely_changed(),
            tooltip="Side of the square whose area pictures are resized to for the backbone; they keep their shape. "
            "0 is the backbone's own. Larger sees finer, and costs more.",
        ),
    ]


def matching_inputs(**options: Any) -> list[io.Input]:
    """How the features of two pictures are matched. `options` go to every input."""
    return [
        io.Float.Input(
            "temperature",
            default=Matching.temperature,
            min=0.001,
            max=1.0,
            step=0.001,
            **options,
            tooltip="Small reads one place and stays crisp, large averages many. 0.1 is a good beginning.",
        ),
        io.Int.Input(
            "top_k",
            default=Matching.top_k,
            min=1,
            max=256,
            **options,
            tooltip="How many places one part reads at most. 1 is a hard choice.",
        ),
        share(
            "balance",
            Matching.balance,
            "0: each part reads what is most like it, even if that is always the same patch. 1: all of the "
            "appearance is used equally much, even where it does not fit.",
            **options,
        ),
        io.Combo.Input(
            "compare",
            options=["tokens", "keys"],
            default=Matching.descriptor,
            **options,
            tooltip="Which features are compared. Keys follow outlines, tokens meaning.",
        ),
    ]


class PreviewFeatures(io.ComfyNode):
    """FEATURES and IMAGE -> a sheet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearancePreviewFeatures",
            **found_by("dino pca", "feature map"),
            display_name="Preview Features",
            category="shape & appearance",
            description=(
                "Shows what a feature extractor takes for the same kind of part, in one picture or across a batch, and "
                "what it finds like a point you choose."
            ),
            inputs=[
                FeatureExtractor.Input("features", tooltip="From Load Feature Extractor."),
                io.Image.Input("image", tooltip="A picture, or a batch whose parts are to be compared."),
                share("x", 0.5, "The point in the first picture: 0 is its left edge, 1 its right edge."),
                share("y", 0.5, "0 is the top edge, 1 the bottom edge."),
                *seeing(),
            ],
            outputs=[io.Image.Output(display_name="preview", tooltip="A row for each picture.")],
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, features: Extractor, image, x, y, block, size) -> io.NodeOutput:
        pictures = image[..., :3]
        found = features(pictures.movedim(-1, 1), block=block, size=size or None)
        drawn = features_sheet(pictures.cpu(), found, x, y)
        return io.NodeOutput(drawn, ui=ui.PreviewImage(drawn, cls=cls))


class PreviewCorrespondence(io.ComfyNode):
    """FEATURES and two IMAGEs -> a sheet, the appearance laid out like the shape, and how sure that is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearancePreviewCorrespondence",
            **found_by("dino matching", "semantic matching", "dense correspondence"),
            display_name="Preview Correspondence",
            category="shape & appearance",
            description="Shows from where in the appearance picture each part of the shape picture would be read.",
            inputs=[
                FeatureExtractor.Input("features", tooltip="From Load Feature Extractor."),
                io.Image.Input("shape", tooltip="One picture, whose layout counts."),
                io.Image.Input("appearance", tooltip="One picture, which is read. Any size."),
                io.Mask.Input("shape_mask", optional=True, tooltip="Where the object is in the shape picture."),
                io.Mask.Input("appearance_mask", optional=True, tooltip="Where the appearance may be read."),
                *matching_inputs(),
                *seeing(),
            ],
            outputs=[
                io.Image.Output(
                    display_name="preview",
                    tooltip="Both pictures, what is read from where, and how sure it is.",
                ),
                io.Image.Output(
                    display_name="rearranged",
                    tooltip="The appearance laid out like the shape, at the shape's size.",
                ),
                io.Mask.Output(
                    display_name="confidence",
                    tooltip="1 where going there and back ends where it began, 0 far away.",
                ),
            ],
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls,
        features: Extractor,
        shape,
        appearance,
        temperature,
        top_k,
        balance,
        compare,
        block,
        size,
        shape_mask=None,
        appearance_mask=None,
    ) -> io.NodeOutput:
        shape, appearance = single_image(shape, "the shape"), single_image(appearance, "the appearance")
        if shape_mask is not None:
            shape_mask = picture_mask(shape_mask, shape, "the shape mask")
        if appearance_mask is not None:
            appearance_mask = picture_mask(appearance_mask, appearance, "the appearance mask")
        seen = {"block": block, "size": size or None}
        output, reference = (features(one.movedim(-1, 1), **seen) for one in (shape, appearance))
        masks = [None if one is None else one[None] for one in (shape_mask, appearance_mask)]
        matching = Matching(compare, temperature=temperature, top_k=top_k, balance=balance)
        pair = PAIRS.get(output, reference, matching, *masks)
        flat = [None if one is None else one[0] for one in (shape_mask, appearance_mask)]
        drawn = correspondence_sheet(shape[0].cpu(), appearance[0].cpu(), pair, *flat)
        picture = warped(appearance[0], pair).movedim(-1, 0)[None]
        target = (shape.shape[1], shape.shape[2])
        moved = F.interpolate(picture, size=target, mode="bilinear", antialias=True).movedim(1, -1)
        sure = F.interpolate(pair.confidence().view(1, 1, *pair.grid).cpu(), size=target, mode="bilinear")[0]
        return io.NodeOutput(drawn, moved, sure, ui=ui.PreviewImage(drawn, cls=cls))
