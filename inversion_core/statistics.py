"""Channel statistics and what is matched with them, with soft masks.

Two layouts are known:

* `"map"`: channel-first maps (B, C, H, W), such as images and latents; masks are (B or 1, H, W) or (B or 1, 1, H, W).
* `"tokens"`: tokens (B, ..., N, C), such as hidden states (B, N, C) or split heads (B, heads, N, D); masks are
  (B or 1, N).

A mask holds weights in [0, 1]: 1 counts fully, 0 not at all. Statistics are computed in float32 (float64 for float64
input) whatever the input's dtype, the variance in two passes, and always as population statistics (divided by the sum
of the weights), so that soft masks and regions of one pixel are well defined. A standard deviation is never smaller
than `eps`: a flat region is moved to the reference's mean, and nothing is divided by zero.

Nothing here waits for the device, except `require_nonempty_mask`, which a caller uses once when a mask comes in.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Layout = Literal["map", "tokens"]

EPS = 1e-5
"""Smallest standard deviation, in the units of the data (latents, images in [0, 1], normalised hidden states)."""

_DIMS: dict[Layout, tuple[int, ...]] = {"map": (-2, -1), "tokens": (-2,)}


class ChannelStatistics(NamedTuple):
    """Mean and standard deviation of each channel, broadcastable to the data they come from.

    (B, C, 1, 1) for maps, (B, ..., 1, C) for tokens; float32, or float64 for float64 data.
    """

    mean: Tensor
    std: Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of `dtype` data are computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def require_nonempty_mask(mask: Tensor, name: str = "mask") -> None:
    """Raise ValueError if an entry of the batch selects nothing, or if a value lies outside [0, 1].

    Args:
        mask: (B, ...), weights in [0, 1].
        name: what to call the mask in the message, as the user knows it.

    Waits for the device: call it once, when the mask comes in, not inside a sampling step.
    """
    if mask.numel() == 0:
        raise ValueError(
            f"{name} has no elements (shape {tuple(mask.shape)}): connect a mask that belongs to the image"
        )
    rows = mask.detach().flatten(1) if mask.ndim > 1 else mask.detach()[None]
    low, high = rows.amin().item(), rows.amax().item()
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise ValueError(f"{name} holds values from {low} to {high}, allowed are 0 to 1: clamp or rescale the mask")
    empty = (rows.amax(dim=1) <= 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"{name} is empty (all zero) in batch entries {empty} of {rows.shape[0]}: "
            "paint the region that counts, or leave the mask unconnected to use everything"
        )


def channel_statistics(
    x: Tensor, mask: Tensor | None = None, *, layout: Layout = "map", eps: float = EPS
) -> ChannelStatistics:
    """Mean and standard deviation of each channel of `x`, weighted by `mask`.

    Args:
        x: (B, C, H, W) or (B, ..., N, C), any floating dtype.
        mask: weights in [0, 1], see the module's text for its shape. A row without weight gives mean 0 and std `eps`.
        layout: which axes are positions.
        eps: smallest standard deviation.

    Raises:
        ValueError: the mask does not fit `x`.
    """
    dims = _DIMS[layout]
    x = x.to(statistics_dtype(x.dtype))
    if mask is None:
        mean = x.mean(dim=dims, keepdim=True)
        variance = (x - mean).square().mean(dim=dims, keepdim=True)
    else:
        weight = align_mask(mask, x, layout=layout).to(x.dtype)
        total = weight.sum(dim=dims, keepdim=True)
        weight = weight / torch.where(total > 0, total, torch.ones_like(total))
        mean = (x * weight).sum(dim=dims, keepdim=True)
        variance = ((x - mean).square() * weight).sum(dim=dims, keepdim=True)
    return ChannelStatistics(mean, variance.clamp_min(eps**2).sqrt())


def standardise(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    layout: Layout = "map",
    eps: float = EPS,
    statistics: ChannelStatistics | None = None,
) -> Tensor:
    """`(x - mean) / std` per channel, everywhere, with the statistics inside `mask`. Shape and dtype of `x`.

    `statistics`, if given, are used instead of those of `x`.
    """
    mean, std = statistics or channel_statistics(x, mask, layout=layout, eps=eps)
    return ((x.to(mean.dtype) - mean) / std).to(x.dtype)


def apply_statistics(
    x: Tensor, target: ChannelStatistics, mask: Tensor | None = None, *, layout: Layout = "map", eps: float = EPS
) -> Tensor:
    """`x` moved, everywhere, to the mean and standard deviation of `target`, its own taken inside `mask`.

    `y = (x - mean) / std * target.std + target.mean`. Shape and dtype of `x`.
    """
    mean, std = channel_statistics(x, mask, layout=layout, eps=eps)
    return ((x.to(mean.dtype) - mean) * (target.std / std) + target.mean).to(x.dtype)


def adain(
    x: Tensor,
    reference: Tensor,
    mask: Tensor | None = None,
    mask_ref: Tensor | None = None,
    strength: float = 1.0,
    *,
    layout: Layout = "map",
    eps: float = EPS,
) -> Tensor:
    """Adaptive instance normalisation: the channels of `x` take the reference's mean and standard deviation.

    `y = (x - mean_x) / std_x * std_r + mean_r` with the statistics inside the masks (Huang and Belongie,
    arXiv 1703.06868), then blended: `x + strength * mask * (y - x)`. Where the mask is 0, `x` is unchanged bit for bit;
    with `strength` 0 the very tensor `x` is returned.

    Args:
        x: (B, C, H, W) or (B, ..., N, C).
        reference: same channels, any number of positions, batch B or 1.
        mask: where `x` is measured and changed; None = everywhere.
        mask_ref: where the reference is measured; None = everywhere.
        strength: 0 to 1.

    Raises:
        ValueError: strength outside [0, 1], or channels, batch sizes or masks that do not fit.

    Differences from common code: population instead of sample variance; `std = max(std, eps)` instead of
    `sqrt(var + eps)`, so a low-contrast region is matched exactly.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}, allowed is 0 (unchanged) to 1 (fully matched)")
    channels = -3 if layout == "map" else -1
    if x.ndim != reference.ndim or x.shape[channels] != reference.shape[channels]:
        raise ValueError(
            f"reference has shape {tuple(reference.shape)} but x has {tuple(x.shape)}: "
            f"layout {layout!r} needs as many axes and channels in both"
        )
    if reference.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"reference has batch size {reference.shape[0]}, allowed is 1 or that of x, {x.shape[0]}")
    if strength == 0:
        return x
    target = channel_statistics(reference, mask_ref, layout=layout, eps=eps)
    full = x.to(target.mean.dtype)
    matched = apply_statistics(full, target, mask, layout=layout, eps=eps)
    if mask is None:
        return (matched if strength == 1 else torch.lerp(full, matched, strength)).to(x.dtype)
    weight = align_mask(mask, x, layout=layout).to(full.dtype) * strength
    return torch.lerp(full, matched, weight.expand_as(full)).to(x.dtype)


def align_mask(mask: Tensor, x: Tensor, *, layout: Layout) -> Tensor:
    """`mask` as a view that broadcasts against `x`; see the module's text for the shapes.

    Raises:
        ValueError: the mask has another size or batch than `x`.
    """
    if layout == "map":
        positions = tuple(x.shape[-2:])
        view = mask[:, None] if mask.ndim == 3 else mask
        fits = view.ndim == 4 and view.shape[1] == 1 and tuple(view.shape[-2:]) == positions
        wanted = f"(B or 1, {positions[0]}, {positions[1]})"
    else:
        fits = mask.ndim == 2 and mask.shape[1] == x.shape[-2]
        view = mask.reshape(mask.shape[0], *([1] * (x.ndim - 3)), mask.shape[1], 1) if fits else mask
        wanted = f"(B or 1, {x.shape[-2]})"
    if not fits or mask.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} but the data {tuple(x.shape)} needs {wanted} with B = {x.shape[0]}: "
            "resize the mask or connect the one that belongs to this data"
        )
    return view
