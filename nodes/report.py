"""Injection Report: what KV Injection did in the run that has just ended."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..inversion_core.hosts.comfy_injection import last_report
from .host import heat_picture
from .newer import found_by


class InjectionReport(io.ComfyNode):
    """MODEL and the sampler's LATENT -> LATENT, text, IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearanceInjectionReport",
            **found_by("attention map", "debug injection"),
            display_name="Injection Report",
            category="shape & appearance",
            description=(
                "After the sampler: which self-attentions were edited, how often and how strongly, what the references "
                "cost, and where the appearance reference was read."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that went into the sampler, patched by KV Injection."),
                io.Latent.Input("latent", tooltip="What the sampler made of it: the report is drawn up after it."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The latent put in, unchanged."),
                io.String.Output(display_name="report", tooltip="The report as text."),
                io.Image.Output(
                    display_name="reading", tooltip="Where the first appearance reference was read; black: nowhere."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, latent) -> io.NodeOutput:
        report = last_report(model)
        picture = heat_picture(report.reading)
        shown = {**ui.PreviewText(report.text()).as_dict(), **ui.PreviewImage(picture, cls=cls).as_dict()}
        return io.NodeOutput(latent, report.text(), picture, ui=shown)
