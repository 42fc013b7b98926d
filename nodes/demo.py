"""Load Demo Model and Demo Picture: all that the example workflows need, so that they run as they are opened."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io, ui

from ..demo import world
from .host import embedding_folders
from .newer import found_by
from .widgets import fixed_seed

if TYPE_CHECKING:
    from ..demo.model import Network

NOTHING = "nothing"


class LoadDemoModel(io.ComfyNode):
    """The embedded model as a checkpoint loader's three outputs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearanceLoadDemoModel",
            **found_by("toy model", "checkpoint", "example model"),
            display_name="Load Demo Model",
            category="shape & appearance",
            description=(
                "The small text-to-image model that comes with this pack: nothing to download. It knows one toy world, "
                "at 128x128: 'a red striped star on sky'. To work with your own model, use Load Checkpoint instead."
            ),
            inputs=[
                io.Combo.Input(
                    "network",
                    options=["UNet", "DiT"],
                    default="UNet",
                    optional=True,
                    tooltip="UNet: in SD1's shape, with v-prediction. DiT: a flow-matching transformer in SD3's.",
                )
            ],
            outputs=[
                io.Model.Output(tooltip="The diffusion model: the one that is chosen."),
                io.Clip.Output(tooltip="The text encoder. It knows the words of the demo world."),
                io.Vae.Output(tooltip="The autoencoder: 8x smaller, 4 channels, like SD1's."),
            ],
        )

    @classmethod
    def execute(cls, network: Network = "UNet") -> io.NodeOutput:
        from ..demo.model import load_demo_model

        return io.NodeOutput(*load_demo_model(embedding_directory=embedding_folders(), network=network))


class DemoPicture(io.ComfyNode):
    """A picture of the demo world in place of Load Image: the same two outputs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearanceDemoPicture",
            **found_by("example image", "toy picture", "test image"),
            display_name="Demo Picture",
            category="shape & appearance",
            description=(
                "Draws a picture of the demo model's toy world, and the mask of its object. It stands where your own "
                "picture goes: put Load Image in its place, which has the same two outputs."
            ),
            inputs=[
                io.Combo.Input(
                    "shape",
                    options=[*world.SHAPES, NOTHING],
                    default="heart",
                    tooltip="The object. The demo model never saw heart, fish, mushroom and leaf. 'nothing' draws the "
                    "background alone, and the mask is then empty.",
                ),
                io.Combo.Input("color", options=list(world.COLOURS), default="purple", tooltip="Of the object."),
                io.Combo.Input("texture", options=list(world.TEXTURES), default="plain", tooltip="Of the object."),
                io.Combo.Input("background", options=list(world.BACKGROUNDS), default="sky", tooltip="What is behind."),
                fixed_seed(
                    "seed", "Of all that is not chosen here: place, size, rotation, exact tones, width of stripes."
                ),
                io.Int.Input(
                    "size",
                    default=world.SIZE,
                    min=64,
                    max=2048,
                    step=8,
                    tooltip="Side in pixels. 128 suits the demo model, 512 SD1.x, 1024 SDXL.",
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="The picture."),
                io.Mask.Output(tooltip="Where its object is."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, shape, color, texture, background, seed, size) -> io.NodeOutput:
        shapes = () if shape == NOTHING else (shape,)
        drawn = world.sample(
            seed, shapes=shapes or world.TRAINED_SHAPES, textures=(texture,), colour=color, background=background
        )
        picture, mask = world.render(drawn, size) if shapes else (world.background(drawn, size), None)
        image = torch.from_numpy(picture)[None]
        inside = torch.zeros(1, size, size) if mask is None else torch.from_numpy(mask)[None]
        return io.NodeOutput(image, inside, ui=ui.PreviewImage(image, cls=cls))
