"""The pack's own socket types."""

from __future__ import annotations

from comfy_api.latest import io

Reference = io.Custom("SHAPE_APPEARANCE_REFERENCE")
"""An `inversion_core.reference.Reference`."""
