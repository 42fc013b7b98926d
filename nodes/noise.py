"""Invert Reference: the noise with which the model itself would draw a reference."""

from __future__ import annotations

from typing import Any

import latent_preview
from comfy_api.latest import io
from tqdm import tqdm

from ..inversion_core.hosts.comfy_noise import invert
from .host import single_reference
from .newer import found_by, rarely_changed
from .sockets import Reference
from .widgets import fixed_seed


class InvertReference(io.ComfyNode):
    """MODEL and REFERENCE -> REFERENCE with a trajectory, and what SamplerCustom needs to draw it again."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearanceInvertReference",
            **found_by("ddim inversion", "ddpm inversion", "edit friendly"),
            display_name="Invert Reference",
            category="shape & appearance",
            description=(
                "Finds the noise from which the model draws this reference, so that it is read along its own way from "
                "noise to picture, not under a fixed noise. Costs about as much as generating a picture or two, once. "
                "With SamplerCustom (add_noise off, cfg 1, the same conditioning) the last three outputs give the "
                "picture back."
            ),
            inputs=[
                io.Model.Input("model", tooltip="SD1.x, SD2.x, SDXL or the demo model, before KV Injection."),
                Reference.Input("reference", tooltip="From Encode Reference, with the VAE of this model."),
                io.Combo.Input(
                    "policy",
                    options=["ddim", "edit-friendly"],
                    default="ddim",
                    tooltip="'ddim' follows the model's own flow and gives the picture back closely; three passes a "
                    "step. 'edit-friendly' (DDPM) gives every level noise of its own and the picture back exactly; one "
                    "pass a step.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=1000,
                    tooltip="20 is a good beginning. More: closer to the picture, and slower.",
                ),
                fixed_seed("noise_seed", "Of the noise of 'edit-friendly'; 'ddim' has none.", **rarely_changed()),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="A prompt that describes the reference, which keeps it. Needed unless it has one already.",
                ),
            ],
            outputs=[
                Reference.Output("inverted", "reference", tooltip="For KV Injection."),
                io.Latent.Output("latent", tooltip="The noise that the picture starts from."),
                io.Sampler.Output("sampler", tooltip="Draws the picture from the latent."),
                io.Sigmas.Output("sigmas", tooltip="The schedule of the inversion; the sampler needs the same."),
            ],
        )

    @classmethod
    def execute(cls, model, reference, policy, steps, noise_seed, conditioning=None) -> io.NodeOutput:
        one = single_reference(reference, "the")
        show = latent_preview.prepare_callback(model, steps)
        with tqdm(total=steps, desc="Invert Reference") as bar:  # on the terminal, as samplers do

            def shown(*news: Any) -> None:
                show(*news)
                bar.update()

            found = invert(model, one, policy, steps, conditioning=conditioning, seed=noise_seed, callback=shown)
        return io.NodeOutput((found.reference,), {"samples": found.start}, found.sampler, found.sigmas)
