"""The demo's stand-in for DINO: a small timm VisionTransformer, self-supervised on the demo world."""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import VisionTransformer

from .weights import VIT

PATCH = 8
WIDTH = 128
_OPTIONS: dict[str, Any] = {"img_size": 128, "embed_dim": WIDTH, "depth": 6, "num_heads": 4}
BACKBONE: dict[str, Any] = {
    "name": "demo-vit",
    "file": VIT,
    "options": _OPTIONS,
    "patch": PATCH,
    "size": 128,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}
"""The fields of an `inversion_core.features.Backbone`; its file lies in `weights.FOLDER`."""


def build_vit() -> VisionTransformer:
    """(B, 3, H, W) in [-1, 1], H and W multiples of 8 -> CLS and patch tokens of width 128."""
    return VisionTransformer(patch_size=PATCH, num_classes=0, dynamic_img_size=True, **_OPTIONS)
