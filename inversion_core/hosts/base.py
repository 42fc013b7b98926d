"""What every host shares: fitting tokens and masks to the grid of an attention call, and the errors hosts raise."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ..injection import Window
from ..reference import Reference


class HostError(RuntimeError):
    """A model or a reference that the host cannot work with; the message says which and what to do."""


def require_channels(reference: Reference, channels: int, model: str) -> None:
    """Raise HostError if a reference's latent has not the channels of the model's latents."""
    found = reference.latent.shape[1]
    if found != channels:
        raise HostError(
            f"the reference has {found} latent channels, but this model ({model}) works with {channels}: "
            "encode it with the VAE that belongs to this model"
        )


def limits(sampling: Any, window: Window) -> tuple[float, float]:
    """The sigmas at the start and the end of a window of sampling percent, as ComfyUI counts it for conditionings.

    `sampling` has ComfyUI's `percent_to_sigma`, which may wait for the device.
    """
    return float(sampling.percent_to_sigma(window.start)), float(sampling.percent_to_sigma(window.end))


def inside(sampling: Any, window: Window, sigma: float) -> bool:
    """Whether a sigma lies in a window."""
    start, end = limits(sampling, window)
    return end < sigma <= start


class Grid(NamedTuple):
    """Rows and columns of the tokens at an attention site or of a latent."""

    height: int
    width: int


class Crop(NamedTuple):
    """The part of the whole latent that a call of the model sees, in latent cells of the whole (`full`)."""

    top: int
    left: int
    size: Grid
    full: Grid

    def whole(self, grid: Grid) -> Grid:
        """The grid of the whole picture where a call that sees this part has this one."""
        rows = round(grid.height * self.full.height / self.size.height)
        return Grid(rows, round(grid.width * self.full.width / self.size.width))

    def of(self, maps: Tensor, grid: Grid, mode: str) -> Tensor:
        """Maps (B, C, h, w) over the whole picture -> (B, C, *grid), the part that a call with this grid sees."""
        whole = _resize(maps, self.whole(grid), mode)
        top, left = self.corner(grid)
        return whole[:, :, top : top + grid.height, left : left + grid.width]

    def corner(self, grid: Grid) -> tuple[int, int]:
        """Row and column in the whole picture's grid where the part that a call with this grid sees begins."""
        rows, columns = self.whole(grid)
        return round(self.top * rows / self.full.height), round(self.left * columns / self.full.width)


def tokens_to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """(B, h*w, C) -> (B, C, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def map_to_tokens(maps: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h*w, C)."""
    return maps.flatten(2).transpose(1, 2)


def mask_to_tokens(mask: Tensor, grid: Grid) -> Tensor:
    """Mask (1, 1, H, W) over a whole picture -> (1, h*w): the share of each token that the mask covers."""
    return _resize(mask, grid, "area").flatten(1)


def _resize(maps: Tensor, grid: Grid, mode: str) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(grid):
        return maps
    if mode == "area":
        return F.interpolate(maps, size=tuple(grid), mode="area")
    return F.interpolate(maps, size=tuple(grid), mode="bilinear", antialias=True).to(maps.dtype)
