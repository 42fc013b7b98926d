"""The demo's autoencoder: ComfyUI's own Encoder and Decoder behind a pixel-unshuffle stem, 8x down to 4 channels."""

from __future__ import annotations

import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder
from torch import Tensor, nn

STEM = 4
"""The stem folds 4x4 pixels into channels, so that no convolution runs at full resolution: CPUs stay quick."""


class DemoAutoencoder(nn.Module):
    """Deterministic autoencoder with the interface `comfy.sd.VAE` expects of a first stage.

    Pictures (B, 3, H, W) in [-1, 1] with H and W multiples of 8; latents (B, 4, H/8, W/8). No activation bounds the
    latent. Latents are centred and scaled per channel by `shift` and `scale` to about unit variance. `preview` (4, 3)
    and `preview_bias` (3,) turn a latent into a rough RGB picture in [-1, 1]: ComfyUI's latent previews.
    """

    def __init__(self) -> None:
        super().__init__()
        size = {
            "double_z": False,
            "z_channels": 4,
            "resolution": 32,
            "in_channels": 3 * STEM**2,
            "out_ch": 3 * STEM**2,
            "ch": 64,
            "ch_mult": [1, 2],
            "num_res_blocks": 2,
            "attn_resolutions": [],
            "dropout": 0.0,
        }
        self.encoder = Encoder(**size)
        self.decoder = Decoder(**size)
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.zeros(1, 4, 1, 1))
        self.register_buffer("scale", torch.ones(1, 4, 1, 1))
        self.preview: Tensor
        self.preview_bias: Tensor
        self.register_buffer("preview", torch.zeros(4, 3))
        self.register_buffer("preview_bias", torch.zeros(3))

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 4, H/8, W/8), about unit variance."""
        latent = self.encoder(nn.functional.pixel_unshuffle(pixels, STEM))
        shift, scale = self._statistics(latent)
        return (latent - shift) / scale

    def decode(self, latent: Tensor, **_: object) -> Tensor:
        """(B, 4, h, w) -> (B, 3, 8h, 8w), about [-1, 1]."""
        shift, scale = self._statistics(latent)
        return nn.functional.pixel_shuffle(self.decoder(latent * scale + shift), STEM)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return comfy.ops.cast_to_input(self.shift, like), comfy.ops.cast_to_input(self.scale, like)
