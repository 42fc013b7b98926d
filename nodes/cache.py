"""Save and Load Reference Cache: what a model saw in its references, kept over restarts."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..inversion_core.hosts.comfy_references import load_cache, save_cache
from .folders import CACHES
from .newer import found_by


class SaveReferenceCache(io.ComfyNode):
    """MODEL and the sampler's LATENT -> a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearanceSaveReferenceCache",
            **found_by("bank", "keep references"),
            display_name="Save Reference Cache",
            category="shape & appearance",
            description=(
                "After the sampler: writes what the model saw in its references to models/reference_caches, so that "
                "after a restart they cost nothing. For this model, LoRAs, steps and scheduler."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that went into the sampler, patched by KV Injection."),
                io.Latent.Input("latent", tooltip="What the sampler made of it: the cache is written after it."),
                io.String.Input("name", default="references", tooltip="Of the file; an older one is replaced."),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, latent, name) -> io.NodeOutput:
        path = CACHES.new(name)
        count = save_cache(model, path)
        size = path.stat().st_size / 2**20
        return io.NodeOutput(ui=ui.PreviewText(f"{count} passes over references in {path.name} ({size:.1f} MiB)"))


class LoadReferenceCache(io.ComfyNode):
    """MODEL and a file -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearanceLoadReferenceCache",
            **found_by("bank", "keep references"),
            display_name="Load Reference Cache",
            category="shape & appearance",
            description="Reads a file that Save Reference Cache wrote, before sampling with the same model.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the cache was saved with; another one is refused."),
                io.Combo.Input("name", options=CACHES.names(), tooltip="A file in models/reference_caches."),
            ],
            outputs=[io.Model.Output(tooltip="The model put in, for KV Injection: this sets the order.")],
        )

    @classmethod
    def execute(cls, model, name) -> io.NodeOutput:
        load_cache(model, CACHES.path(name))
        return io.NodeOutput(model)
