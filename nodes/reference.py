"""Encode Reference: a picture becomes something a model can read from."""

from __future__ import annotations

from comfy_api.latest import io

from .host import encode_reference
from .newer import found_by, rarely_changed
from .sockets import Reference
from .widgets import fixed_seed, share


class EncodeReference(io.ComfyNode):
    """IMAGE, VAE and optional MASK and CONDITIONING -> REFERENCE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearanceEncodeReference",
            **found_by("reference image", "style image", "structure image"),
            display_name="Encode Reference",
            category="shape & appearance",
            description="Prepares a picture, of any size, to give its shape or its appearance to what you generate.",
            inputs=[
                io.Image.Input("image", tooltip="One picture. It need not have the size of the result."),
                io.Vae.Input("vae", tooltip="The VAE of the model that will read the reference."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the object is: only there is appearance read. Resized to the picture if it has its "
                    "shape; an empty mask is refused. Without a mask the whole picture is read.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="A prompt that describes this picture. Without it the sampler's negative prompt is used.",
                ),
                fixed_seed(
                    "noise_seed",
                    "Seed of the fixed noise the reference is mixed with at every step. Rarely worth changing.",
                    **rarely_changed(),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.01,
                    max=10.0,
                    step=0.01,
                    tooltip="How much this picture counts beside others read with it: 2 outweighs one of 1; far more, "
                    "and the others are hardly read. Alone it is read fully.",
                ),
                share(
                    "flatten",
                    0.0,
                    "For a shape: how much of the texture inside the mask goes before it is read, so that only the "
                    "outline is kept. Begin with 0, which keeps folds and features; raise it if the shape's own "
                    "texture shows through. 1 leaves one flat colour.",
                ),
                Reference.Input("others", optional=True, tooltip="References to be read together with this one."),
            ],
            outputs=[
                Reference.Output(display_name="reference", tooltip="For KV Injection: as appearance or as shape.")
            ],
        )

    @classmethod
    def execute(
        cls, image, vae, noise_seed, strength, flatten, mask=None, conditioning=None, others=()
    ) -> io.NodeOutput:
        reference = encode_reference(
            image, vae, mask, flatten, conditioning=conditioning, noise_seed=noise_seed, strength=strength
        )
        return io.NodeOutput((*others, reference))
