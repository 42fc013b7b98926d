"""The pack's own socket types."""

from __future__ import annotations

from comfy_api.latest import io

Reference = io.Custom("SHAPE_APPEARANCE_REFERENCE")
"""A tuple of `inversion_core.reference.Reference`, one for each picture."""

Preset = io.Custom("SHAPE_APPEARANCE_PRESET")
"""An `inversion_core.presets.Preset`."""

Inversion = io.Custom("SHAPE_APPEARANCE_INVERSION")
"""An `inversion_core.learning.inversion.Inversion`."""

FeatureExtractor = io.Custom("SHAPE_APPEARANCE_FEATURES")
"""An `inversion_core.features.FeatureExtractor`: a loaded backbone."""
