"""Shape & Appearance: image-guided composition for ComfyUI. ComfyUI loads the pack through `comfy_entrypoint`."""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"
"""Where ComfyUI finds the help pages: `docs/<node id>/<language>.md`."""


async def comfy_entrypoint() -> Any:
    """The pack's ComfyExtension. Nothing of ComfyUI or torch is imported before ComfyUI asks."""
    from .nodes.extension import ShapeAppearanceExtension

    return ShapeAppearanceExtension()
