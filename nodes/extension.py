"""The one list of the pack's nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .attention import KVInjection
from .color import AdaINColorGuidance, AdaINColorMatch
from .demo import LoadDemoModel
from .reference import EncodeReference


class ShapeAppearanceExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadDemoModel, EncodeReference, KVInjection, AdaINColorMatch, AdaINColorGuidance]
