"""Places of tokens in transformers that turn them into queries and keys (RoPE), and tokens moved to other places.

Turns add up, so a key that was kept at one place and is turned on by the difference is the key at another: exactly,
without its layer. All that attention sees of two places is how far they are apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Crop, Grid, HostError

COMPLEX = ("cpu", "cuda")
"""Devices that multiply complex numbers: a turn is one pass there, sixty times as fast on a CPU."""

Place = tuple[int, int, int]
"""Frame, row and column, in tokens."""


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Tokens (B, N, H * D) with each pair of neighbouring channels of every head turned; `turn` is (D / 2, 2, 2)."""
    pairs = x.float().contiguous().unflatten(2, (-1, turn.shape[0], 2))
    if x.device.type in COMPLEX:
        done = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(turn[:, 0, 0], turn[:, 1, 0]))
    else:
        done = turn[..., 0] * pairs[..., :1] + turn[..., 1] * pairs[..., 1:]
    return done.flatten(2).to(x.dtype)


@dataclass(frozen=True)
class Places:
    """Where a picture's tokens are in one attention call of a model.

    Attributes:
        first: number of the picture's first frame; the model may count the prompt before it.
        centred: whether rows and columns are counted from the middle of a picture, not from its corner.
        move: tokens (B, N, H * D), every one moved by the same.
    """

    first: int
    centred: bool
    move: Callable[[Tensor, Place], Tensor]

    def kept(self, x: Tensor) -> Tensor:
        """What is kept of a picture: its tokens as if its first frame were number 0."""
        return self._moved(x, (-self.first, 0, 0))

    def over(self, x: Tensor) -> Tensor:
        """A kept reference with every token at the place where the model would see it in this picture."""
        return self._moved(x, (self.first, 0, 0))

    def beside(self, x: Tensor, seen: Grid, picture: Grid) -> Tensor:
        """A kept reference of grid `seen` as a picture of its own, left of this one: no place is taken twice.

        To its left, because further pictures of the model's own (Kontext) may lie to the right and below.
        """
        column = self._corner(picture.width) - self._corner(seen.width) - seen.width
        return self._moved(x, (self.first, 0, column))

    def within(self, x: Tensor, *, seen: Grid, crop: Crop, picture: Grid) -> Tensor:
        """The part of a kept reference that a call sees which is given only a part of the picture.

        Raises:
            HostError: the part does not consist of whole tokens of the reference.
        """
        if crop.whole(picture) != seen:
            raise HostError(
                f"a prompt has an area of {crop.size.height} x {crop.size.width} latent cells, which are no whole "
                f"tokens of this model, and a shape reference cannot be cut to it: give areas sides that are "
                "multiples of 16 pixels, or disconnect the shape reference"
            )
        top, left = crop.corner(picture)
        row = self._corner(picture.height) - self._corner(seen.height) - top
        column = self._corner(picture.width) - self._corner(seen.width) - left
        return self._moved(x, (self.first, row, column))

    def _corner(self, side: int) -> int:
        return -(side // 2) if self.centred else 0

    def _moved(self, x: Tensor, by: Place) -> Tensor:
        return x if by == (0, 0, 0) else self.move(x, by)
