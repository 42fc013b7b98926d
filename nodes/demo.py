"""Load Demo Model: the small model inside the pack."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from .host import embedding_folders
from .newer import found_by

if TYPE_CHECKING:
    from ..demo.model import Network


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
