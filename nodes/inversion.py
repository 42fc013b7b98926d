"""Shape Inversion and Appearance Inversion learn a token and an offset; Apply, Save and Load Inversion use them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from comfy_api.latest import io, ui

from ..inversion_core.hosts.comfy_inversion import apply_inversion
from ..inversion_core.learning.files import load_inversion
from ..inversion_core.learning.plan import Framing, Plan
from ..inversion_core.learning.recipes import APPEARANCE_OBJECTIVES, SITES, Quality
from .folders import INVERSIONS
from .inversion_files import save
from .newer import found_by, rarely_changed
from .sockets import FeatureExtractor, Inversion
from .training import fitted, learned, plan_of, proposed
from .widgets import fixed_seed

CATEGORY = "shape & appearance/inversion"
_TOKEN = "What stands for it in prompts, between < and >. A word the text encoder knows needs them here too: <chair>."
_QUALITY = (
    "How much is spent on a step: pictures at once, size of the token and of the offset. fast: to try. thorough: for "
    "what is complex, with much memory."
)


def _inputs(of: str, name: str, class_word: str, *, sockets: Sequence = (), settings: Sequence = ()) -> list:
    """What both nodes ask for: `of` is what the pictures show; `sockets` and `settings` are a node's own."""
    return [
        io.Model.Input("model", tooltip="An SD1.x, SD2.x or SDXL model, or the demo model; LoRAs included."),
        io.Clip.Input("clip", tooltip="The text encoder that belongs to it."),
        io.Vae.Input("vae", tooltip="The VAE that belongs to it."),
        io.Image.Input("images", tooltip=f"One to five pictures of the {of}."),
        io.Mask.Input(
            "mask",
            optional=True,
            tooltip=f"Where the {of} is: one mask for all, or one for each picture. Without it, what stands out from "
            "the border is taken; look at the output.",
        ),
        *sockets,
        io.String.Input("token", default=name, tooltip=_TOKEN),
        io.String.Input("class_word", default=class_word, tooltip="What it is in plain words; learning begins there."),
        io.Int.Input(
            "steps",
            default=200,
            min=1,
            max=100_000,
            tooltip="200 is a beginning. More learn closer, and may obey prompts less.",
        ),
        io.Combo.Input("quality", options=list(get_args(Quality)), default="balanced", tooltip=_QUALITY),
        *settings,
        io.Combo.Input(
            "sites",
            options=list(SITES),
            default="default",
            optional=True,
            **rarely_changed(),
            tooltip="Which layers the offset changes. default: what was measured best for this node. B-LoRA: one "
            "block, of SDXL alone.",
        ),
        io.Int.Input(
            "rank",
            default=0,
            min=0,
            max=256,
            optional=True,
            **rarely_changed(),
            tooltip="Of the offset. 0: as quality says. More can hold more, and makes larger files.",
        ),
        io.Float.Input(
            "learning_rate",
            default=0.0,
            min=0.0,
            max=0.1,
            step=0.0001,
            round=False,
            optional=True,
            **rarely_changed(),
            tooltip="Of the offset, at its highest: around 0.002. 0: the default of this node. Halve it if prompts are "
            "no longer obeyed.",
        ),
        fixed_seed("seed", "Of noise, variants and the offset's beginning.", **rarely_changed()),
        io.Int.Input(
            "size",
            default=512,
            min=64,
            max=2048,
            step=64,
            **rarely_changed(),
            tooltip="Larger pictures are reduced to this side. 512 suits SD1.x, 1024 SDXL; nothing is enlarged.",
        ),
    ]


def _outputs() -> list:
    return [
        Inversion.Output(display_name="inversion", tooltip="For Apply Inversion and Save Inversion."),
        io.Image.Output(display_name="loss plot", tooltip="The loss on fixed noise, step by step."),
        io.String.Output(display_name="report", tooltip="Steps, time and losses."),
        io.Mask.Output(display_name="mask", tooltip="Where the pictures were learned from."),
    ]


def _learned(plan: Plan, model, clip, vae, images, mask, size, features=None) -> io.NodeOutput:
    pictures, masks = fitted(images, mask, size)
    if mask is None:
        masks = proposed(model, clip, vae, pictures, plan.class_word)
    found = learned(model, clip, vae, pictures, masks, plan, features)
    return io.NodeOutput(*found, ui=ui.PreviewMask(found.mask))


class ShapeInversion(io.ComfyNode):
    """MODEL, CLIP, VAE, IMAGE and MASK -> INVERSION."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearanceShapeInversion",
            **found_by("textual inversion", "train", "learn concept", "break-a-scene"),
            display_name="Shape Inversion",
            category=CATEGORY,
            description=(
                "Learns the shape of an object from one to five pictures, free of its colours and textures: a word for "
                "prompts and a small change of the model's layers. The model itself is not changed."
            ),
            inputs=_inputs(
                "object",
                "my-shape",
                "shape",
                settings=[
                    io.Combo.Input(
                        "framing",
                        options=list(get_args(Framing)),
                        default="centred",
                        optional=True,
                        tooltip="Where the object is while it is learned. centred: in the middle, at one size, for "
                        "prompts. as pictured: where and as large as it is, for an outline that stays in its place, "
                        "as beside KV Injection with the same picture.",
                    )
                ],
            ),
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, model, clip, vae, images, size, mask=None, **settings) -> io.NodeOutput:
        return _learned(plan_of("shape", clip, **settings), model, clip, vae, images, mask, size)


class AppearanceInversion(io.ComfyNode):
    """MODEL, CLIP, VAE, IMAGE and optional MASK, shape INVERSION and FEATURES -> INVERSION."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearanceAppearanceInversion",
            **found_by("textual inversion", "train", "learn style", "learn material"),
            display_name="Appearance Inversion",
            category=CATEGORY,
            description=(
                "Learns colours, texture and material from one to five pictures, free of the shape: a word for prompts "
                "and a small change of the model's layers. The model itself is not changed."
            ),
            inputs=_inputs(
                "material",
                "my-look",
                "texture",
                sockets=[
                    Inversion.Input(
                        "shape",
                        optional=True,
                        tooltip="The shape in these pictures, learned before: it stays as it is, and what it explains "
                        "is not learned again.",
                    ),
                    FeatureExtractor.Input(
                        "features", optional=True, tooltip="For the objectives features and token_mse: a DINO backbone."
                    ),
                ],
                settings=[
                    io.Combo.Input(
                        "objective",
                        options=list(APPEARANCE_OBJECTIVES),
                        default="attention",
                        tooltip="What is learned by, beside the diffusion loss. attention: self-attention does as over "
                        "the reference. moments: mean and contrast of the latent. diffusion: nothing else. features: "
                        "a backbone sees the same in the picture. token_mse: the word becomes the picture's CLS vector "
                        "(does not help; docs/appearance-loss.md says why).",
                    )
                ],
            ),
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, model, clip, vae, images, size, mask=None, shape=None, features=None, **settings) -> io.NodeOutput:
        beside = "" if shape is None else f"<{shape.name}>"
        plan = plan_of("appearance", clip, beside=beside, **settings)
        if shape is not None:
            model, clip = apply_inversion(model, clip, shape)
        return _learned(plan, model, clip, vae, images, mask, size, features)


class ApplyInversion(io.ComfyNode):
    """MODEL, CLIP and INVERSION -> MODEL and CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearanceApplyInversion",
            **found_by("textual inversion", "token", "embedding"),
            display_name="Apply Inversion",
            category=CATEGORY,
            description=(
                "Teaches model and text encoder what was learned: write <name> in any CLIP Text Encode after it, with "
                "weights as usual, such as (<name>:1.3). Several can follow one another."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A model of the family the inversion was learned on."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to it."),
                Inversion.Input("inversion", tooltip="What was learned."),
                io.Float.Input(
                    "token_strength",
                    default=1.0,
                    min=-2.0,
                    max=2.0,
                    step=0.01,
                    tooltip="0: <name> means the class word it began as. 1: what was learned. Above 1 exaggerates.",
                ),
                io.Float.Input(
                    "offset_strength",
                    default=1.0,
                    min=-2.0,
                    max=2.0,
                    step=0.01,
                    tooltip="How much of the learned change the model's weights get: 1 as learned, 0 none. Lower it "
                    "first if prompts are no longer obeyed.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="For the sampler. The one put in is unchanged."),
                io.Clip.Output(tooltip="For CLIP Text Encode. The one put in is unchanged."),
            ],
        )

    @classmethod
    def execute(cls, model, clip, inversion, token_strength, offset_strength) -> io.NodeOutput:
        return io.NodeOutput(*apply_inversion(model, clip, inversion, token_strength, offset_strength))


class SaveInversion(io.ComfyNode):
    """INVERSION -> a file in models/inversions, and on request a stock embedding and LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearanceSaveInversion",
            **found_by("export embedding", "export lora"),
            display_name="Save Inversion",
            category=CATEGORY,
            description="Keeps what was learned, with its picture and settings, in models/inversions.",
            is_output_node=True,
            inputs=[
                Inversion.Input("inversion", tooltip="What was learned."),
                io.String.Input("filename", default="my-inversion", tooltip="Without folder and extension."),
                io.Boolean.Input(
                    "stock_files",
                    default=False,
                    tooltip="Also write models/embeddings/<token> and models/loras/<filename>: 'embedding:' in a "
                    "prompt and Load LoRA then do the same without this pack.",
                ),
                io.Boolean.Input("overwrite", default=False, tooltip="Whether files of the same name are replaced."),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, inversion, filename, stock_files, overwrite) -> io.NodeOutput:
        written = save(inversion, filename, overwrite, stock_files)
        return io.NodeOutput(ui=ui.PreviewText("\n".join(map(str, written))))


class LoadInversion(io.ComfyNode):
    """A file of models/inversions -> INVERSION, its picture and its settings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearanceLoadInversion",
            **found_by("embedding", "token"),
            display_name="Load Inversion",
            category=CATEGORY,
            description="Reads what Save Inversion wrote, and shows the picture it was learned from.",
            inputs=[io.Combo.Input("inversion", options=INVERSIONS.names(), tooltip="A file of models/inversions.")],
            outputs=[
                Inversion.Output(display_name="inversion", tooltip="For Apply Inversion."),
                io.String.Output(display_name="about", tooltip="What it is and how it was learned."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def fingerprint_inputs(cls, inversion) -> str:
        return f"{INVERSIONS.path(inversion).stat().st_mtime_ns}"

    @classmethod
    def execute(cls, inversion) -> io.NodeOutput:
        found = load_inversion(INVERSIONS.path(inversion))
        about = f"{found.kind} <{found.name}> for {found.family}, begun as {found.settings.get('class_word')!r}"
        shown = None
        if found.preview is not None:
            shown = ui.PreviewImage(found.preview[None].to(torch.float32) / 255, cls=cls)
        return io.NodeOutput(found, about, ui=shown)
