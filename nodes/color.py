"""AdaIN Color Match and AdaIN Color Guidance: a reference's colours, on pictures and while sampling."""

from __future__ import annotations

from typing import get_args

import comfy.model_management
import comfy.utils
from comfy_api.latest import io, ui

from ..inversion_core.color import ColorMatch, Frames, Space, match_pictures
from ..inversion_core.hosts.comfy_color import ColorGuidance, attach
from ..inversion_core.injection import Window
from ..inversion_core.statistics import Method
from .color_preview import preview_sheet
from .host import output_mask, single_reference
from .newer import found_by
from .picture_mask import picture_mask
from .sockets import Reference
from .widgets import share, window

SPACES: dict[str, Space] = {"CIELAB": "lab", "linear RGB": "linear_rgb"}
FRAMES: dict[str, Frames] = {"per image": "each", "one for all": "all", "from one frame": "one"}
_METHODS = (
    "mkl: mean and covariance, colours move least. adain: mean and contrast of each channel. wct: mean and covariance "
    "by whitening. histogram: each channel's whole distribution. sliced_ot: the joint distribution; slowest."
)


class AdaINColorMatch(io.ComfyNode):
    """IMAGE and a reference IMAGE -> IMAGE and a preview."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearanceAdaINColorMatch",
            **found_by("color transfer", "colour transfer", "histogram matching", "color grading", "recolor"),
            display_name="AdaIN Color Match",
            category="shape & appearance",
            description="Gives an object, or a whole picture, the colours of another. Masks say which object.",
            inputs=[
                io.Image.Input("image", tooltip="What is recoloured: a picture, a batch, or the frames of a video."),
                io.Image.Input("reference", tooltip="Whose colours are taken. Any size and number."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="What is measured and changed; outside, not a bit changes. Of another size, it is "
                    "stretched to the image.",
                ),
                io.Mask.Input("reference_mask", optional=True, tooltip="What of the reference is measured."),
                io.Combo.Input("method", options=list(get_args(Method)), default="mkl", tooltip=_METHODS),
                io.Combo.Input("space", options=list(SPACES), default="CIELAB", tooltip="Where colours are matched."),
                share(
                    "strength",
                    1.0,
                    "1 is a full match; lower it if the result looks unnatural. 0 is exactly the image that was put "
                    "in.",
                ),
                io.Boolean.Input(
                    "keep_luminance", default=False, tooltip="Only hue and chroma change; light and dark stay."
                ),
                io.Int.Input(
                    "feather",
                    default=0,
                    min=0,
                    max=512,
                    tooltip="Pixels over which the change fades in, from the mask's edge inwards. A few hide the edge; "
                    "many leave a rim in the old colour.",
                ),
                io.Combo.Input(
                    "frames",
                    options=list(FRAMES),
                    default="per image",
                    tooltip="Of a batch: each image by itself; or one and the same change for all, so that a video "
                    "does not flicker, measured in all of them or in one frame.",
                ),
                io.Int.Input("frame", default=0, min=0, max=1 << 20, tooltip="Which frame, for 'from one frame'."),
            ],
            outputs=[
                io.Image.Output(tooltip="The image with the reference's colours."),
                io.Image.Output(display_name="preview", tooltip="Before, after and reference with their palettes."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls,
        image,
        reference,
        method,
        space,
        strength,
        keep_luminance,
        feather,
        frames,
        frame,
        mask=None,
        reference_mask=None,
    ) -> io.NodeOutput:
        match = ColorMatch(method, SPACES[space], strength, keep_luminance, feather, FRAMES[frames], frame)
        if mask is not None:
            mask = picture_mask(mask, image, "the mask", stretched=True)
        if reference_mask is not None:
            reference_mask = picture_mask(reference_mask, reference, "the reference mask")
        bar = comfy.utils.ProgressBar(image.shape[0])
        device = comfy.model_management.get_torch_device()
        result = match_pictures(
            image, reference, mask, reference_mask, match, device=device, progress=bar.update_absolute
        )
        sheet = preview_sheet(image[0], result[0], reference[0], mask, reference_mask)
        return io.NodeOutput(result, sheet, ui=ui.PreviewImage(sheet, cls=cls))


class AdaINColorGuidance(io.ComfyNode):
    """MODEL and REFERENCE -> MODEL; works with the stock KSampler, on UNets and DiTs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearanceAdaINColorGuidance",
            **found_by("color transfer", "colour guidance", "latent adain"),
            display_name="AdaIN Color Guidance",
            category="shape & appearance",
            description=(
                "While sampling, the picture the model has in mind takes the reference's colours at every step of a "
                "window. Costs next to nothing, and goes before or after KV Injection."
            ),
            inputs=[
                io.Model.Input("model", tooltip="Any latent image or video model."),
                Reference.Input("reference", tooltip="Whose colours are taken, inside its mask."),
                io.Combo.Input("method", options=list(get_args(Method)), default="adain", tooltip=_METHODS),
                share(
                    "strength",
                    1.0,
                    "1 is a full match; lower leaves the model more freedom. 0 is exactly the model without this node.",
                ),
                *window(
                    0.2,
                    "Where in the sampling it begins; before 0.2 there is little to match.",
                    0.95,
                    "Where it ends, so that the model itself finishes the picture.",
                ),
                io.Combo.Input(
                    "ramp",
                    options=["constant", "rising", "falling"],
                    default="constant",
                    tooltip="Strength over the window: the same throughout, from 0 up (the layout stays free), or down "
                    "to 0 (a hint, then the model goes on by itself).",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the result is matched. Resized to the latent. Else everywhere.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The patched model, for the KSampler. The one put in is unchanged.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        reference,
        method,
        strength,
        start_percent,
        end_percent,
        ramp,
        mask=None,
    ) -> io.NodeOutput:
        window = Window(start_percent, end_percent)
        one = single_reference(reference, "the colour")
        guidance = ColorGuidance(one, method, strength, window, ramp, output_mask(mask))
        return io.NodeOutput(attach(model, guidance))
