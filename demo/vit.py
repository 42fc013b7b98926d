"""The demo's stand-in for DINO: a small timm VisionTransformer, self-supervised on the demo world."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer

PATCH = 8
WIDTH = 128


def build_vit() -> VisionTransformer:
    """(B, 3, H, W) in [-1, 1], H and W multiples of 8 -> CLS and patch tokens of width 128."""
    return VisionTransformer(
        img_size=128,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=6,
        num_heads=4,
        num_classes=0,
        dynamic_img_size=True,
    )
