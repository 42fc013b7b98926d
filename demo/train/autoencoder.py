"""Stage 1: the autoencoder, on pictures of the training vocabulary."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .. import world
from ..autoencoder import DemoAutoencoder
from ..weights import AUTOENCODER, save_weights
from .data import TRAINING_SEED, pictures, reset, write_grid
from .loop import Recipe

BATCH = 16


class AutoencoderStage:
    """Squared plus absolute error, with a little noise on the latent so that near misses still decode well."""

    def __init__(self, device: torch.device, steps: int = 1800) -> None:
        self.recipe = Recipe("autoencoder", steps=steps, learning_rate=1.2e-3, ema=0.995)
        self.device = device
        torch.manual_seed(0)
        self.model = DemoAutoencoder()
        reset(self.model)
        self.model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def loss(self, step: int) -> Tensor:
        first = TRAINING_SEED + step * BATCH
        real = pictures(range(first, first + BATCH))[0].to(self.device, memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16):
            latent = self.model.encode(real)
            seeded = torch.Generator().manual_seed(step)
            noise = torch.randn(latent.shape, generator=seeded).to(latent)
            made = self.model.decode(latent + 0.02 * noise)
        error = made.float() - real
        # The pull to unit size only fixes the free scale of the latent.
        size = (latent.float().square().mean() - 1).square()
        return error.square().mean() * 2 + error.abs().mean() * 0.5 + 0.01 * size

    def samples(self, folder: Path, step: int) -> str:
        real, _ = pictures(range(24), shapes=world.WITHHELD_SHAPES, textures=world.TEXTURES)
        made = self.model.decode(self.model.encode(real.to(self.device))).cpu()
        write_grid(torch.cat([real[:12], made[:12]]), folder / f"{step:06d}.png", 12)
        return f"psnr {psnr(real, made):.2f} dB"

    def export(self) -> None:
        real, _ = pictures(range(TRAINING_SEED, TRAINING_SEED + 256))
        latent = torch.cat([self.model.encode(part.to(self.device)) for part in real.split(32)]).cpu()
        dims = (0, 2, 3)
        shift, scale = latent.mean(dims, keepdim=True), latent.std(dims, keepdim=True)
        state = {key: value.cpu() for key, value in self.model.state_dict().items()}
        state["shift"], state["scale"] = shift, scale
        state["preview"], state["preview_bias"] = _preview((latent - shift) / scale, real)
        save_weights(AUTOENCODER, state)


def _preview(latent: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The linear map from latent to colour that fits best: (4, 3) and (3,)."""
    colours = nn.functional.avg_pool2d(real, 8).permute(0, 2, 3, 1).reshape(-1, 3)
    inputs = latent.permute(0, 2, 3, 1).reshape(-1, 4)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
    fit = torch.linalg.lstsq(inputs, colours).solution
    return fit[:4], fit[4]


def psnr(real: Tensor, made: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], over each picture and then self.model."""
    error = (made.clamp(-1, 1) - real).square().mean(dim=(1, 2, 3)) / 4
    return float((-10 * error.log10()).mean())
