"""Channel statistics and what is matched with them, with soft masks.

Two layouts are known:

* `"map"`: channel-first maps (B, C, H, W), such as images and latents; masks are (B or 1, H, W) or (B or 1, 1, H, W).
* `"tokens"`: tokens (B, ..., N, C), such as hidden states (B, N, C) or split heads (B, heads, N, D); masks are
  (B or 1, N).

A mask holds weights in [0, 1]: 1 counts fully, 0 not at all. Statistics are computed in float32 (float64 for float64
input) whatever the input's dtype, the variance in two passes, and always as population statistics (divided by the sum
of the weights), so that soft masks and regions of one pixel are well defined. A standard deviation is never smaller
than `eps`: a flat region is moved to the reference's mean, and nothing is divided by zero.

Whole distributions are matched in two steps: `fit_transport` finds the map between two sets of weighted points, and
the map is then applied to as many points as wanted. So one map can serve all frames of a video, and a picture of any
size is changed piece by piece.

The statistics of channels never wait for the device. `require_nonempty_mask` and `fit_transport` do.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, get_args

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


# --- matching of whole distributions ---------------------------------------------------------------------------------

Method = Literal["adain", "mkl", "wct", "histogram", "sliced_ot"]

COLOUR_EPS = 1e-3
"""Smallest standard deviation of a matched channel or direction: the rounding noise of 8-bit pictures (1/255/sqrt 12).

What is flatter is noise, and is not stretched to the reference's contrast by more than the reference's deviation / eps.
"""

_ROTATIONS = 12
_PARTICLES = 8192


class Samples(NamedTuple):
    """Points of a distribution: `values` (C, N) and their weights (N,), not negative and not all 0; one float dtype."""

    values: Tensor
    weight: Tensor


class Transport(Protocol):
    """Moves points (C, ...) of the source's distribution to where the reference's has them; same shape and dtype."""

    def __call__(self, x: Tensor) -> Tensor: ...


def samples(x: Tensor, mask: Tensor | None = None) -> Samples:
    """All points of `x` (C, ...) in float32 (float64 for float64), weighted by `mask` (...) if there is one.

    Raises:
        ValueError: the mask has another shape than the points.
    """
    if mask is not None and mask.shape != x.shape[1:]:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} but the data {tuple(x.shape)} needs {tuple(x.shape[1:])}: "
            "resize the mask or connect the one that belongs to this data"
        )
    values = x.flatten(1).to(statistics_dtype(x.dtype))
    weight = values.new_ones(values.shape[1]) if mask is None else mask.flatten().to(values)
    return Samples(values, weight)


def fit_transport(method: Method, source: Samples, reference: Samples, *, eps: float = COLOUR_EPS) -> Transport:
    """The map that carries the source's distribution to the reference's.

    Args:
        method: what of the distributions is matched:
            `"adain"`: mean and standard deviation of each channel (Huang and Belongie, arXiv 1703.06868);
            `"mkl"`: mean and covariance by the linear Monge-Kantorovich map, which moves colours least (Pitie and
            Kokaram 2007, "The linear Monge-Kantorovitch linear colour mapping for example-based colour transfer");
            `"wct"`: mean and covariance by whitening and colouring (Li et al., arXiv 1705.08086);
            `"histogram"`: the whole distribution of each channel, as scikit-image's `match_histograms` does it where no
            values are equal; what differs where some are, `_curve` says;
            `"sliced_ot"`: the whole joint distribution, channel by channel along random axes (Pitie et al. 2007,
            "Automated colour grading using colour distribution transfer"), without its regrain step.
        source, reference: points of as many channels.
        eps: smallest standard deviation, in the units of the data. A flat source goes to the reference's mean with
            every method.

    Raises:
        ValueError: an unknown method, channels that differ, or weights that are all zero.
    """
    if source.values.shape[0] != reference.values.shape[0]:
        raise ValueError(
            f"the source has {source.values.shape[0]} channels but the reference {reference.values.shape[0]}: "
            "both must come from the same colour space or the same VAE"
        )
    for name, found in (("source", source), ("reference", reference)):
        if not bool((found.weight > 0).any()):
            raise ValueError(
                f"the mask of the {name} is empty: paint the region that counts, or leave the mask unconnected"
            )
    if method == "adain":
        return _fit_adain(source, reference, eps)
    if method in ("mkl", "wct"):
        return _fit_covariance(method, source, reference, eps)
    if method == "histogram":
        return _fit_histogram(source, reference)
    if method == "sliced_ot":
        return _fit_sliced(source, reference)
    raise ValueError(f"method is {method!r}, allowed are {', '.join(get_args(Method))}")


class _Affine(NamedTuple):
    """`matrix (x - from_mean) + to_mean`; a matrix (C, 1) is a scale for each channel."""

    matrix: Tensor
    from_mean: Tensor
    to_mean: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.flatten(1).to(self.matrix.dtype)
        if self.matrix.shape[1] == 1:
            moved = torch.addcmul(self.to_mean - self.matrix * self.from_mean, flat, self.matrix)
        else:
            moved = torch.addmm(self.to_mean - self.matrix @ self.from_mean, self.matrix, flat)
        return moved.view(x.shape).to(x.dtype)


def _fit_adain(source: Samples, reference: Samples, eps: float) -> Transport:
    (mean, std), (mean_ref, std_ref) = (
        channel_statistics(one.values.T[None], one.weight[None], layout="tokens", eps=eps)
        for one in (source, reference)
    )
    return _Affine(*(column[0].T for column in (std_ref / std, mean, mean_ref)))


def _fit_covariance(method: Method, source: Samples, reference: Samples, eps: float) -> Transport:
    # C x C matrices: float64 on the CPU costs nothing, and not every device has float64 or an eigensolver.
    (mean, cov), (mean_ref, cov_ref) = (_moments(one, eps) for one in (source, reference))
    root, whiten = _power(cov, 0.5), _power(cov, -0.5)
    coloured = _power(cov_ref, 0.5) if method == "wct" else whiten @ _power(root @ cov_ref @ root, 0.5)
    matrix = coloured @ whiten
    return _Affine(matrix.to(source.values), mean, mean_ref)


def _moments(found: Samples, eps: float) -> tuple[Tensor, Tensor]:
    """Mean (C, 1) and covariance (C, C), the latter in float64 on the CPU with `eps` squared on its diagonal.

    The same on both sides leaves the map between equal distributions the identity, and keeps a direction without
    spread, such as that across the two tones of a striped object, from being stretched.
    """
    weight = found.weight / found.weight.sum()
    mean = (found.values * weight).sum(dim=1, keepdim=True)
    centred = found.values - mean
    cov = ((centred * weight) @ centred.T).cpu().double()
    return mean, cov + eps**2 * torch.eye(cov.shape[0], dtype=cov.dtype)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(torch.finfo(values.dtype).tiny) ** exponent) @ vectors.T


class _Curve(NamedTuple):
    """A rising map of one channel through points `x` -> `y`; beyond them it goes on with slope 1."""

    x: Tensor
    y: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        inside = x.clamp(self.x[0], self.x[-1])
        return _interpolate(inside, self.x, self.y) + (x - inside)


class _Curves(NamedTuple):
    """One curve a channel, along the axes that are the rows of `axes` (C, C); None: the channels themselves."""

    curves: tuple[_Curve, ...]
    axes: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.flatten(1).to(self.curves[0].x.dtype)
        along = flat if self.axes is None else self.axes @ flat
        moved = torch.stack([curve(row.contiguous()) for curve, row in zip(self.curves, along, strict=True)])
        back = moved if self.axes is None else self.axes.T @ moved
        return back.view(x.shape).to(x.dtype)


class _Chain(NamedTuple):
    steps: tuple[Transport, ...]

    def __call__(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


def _fit_histogram(source: Samples, reference: Samples) -> _Curves:
    return _Curves(
        tuple(
            _curve(x, source.weight, y, reference.weight) for x, y in zip(source.values, reference.values, strict=True)
        )
    )


def _curve(x: Tensor, weight: Tensor, y: Tensor, weight_ref: Tensor) -> _Curve:
    """The rising map between two weighted distributions of one channel: optimal transport, averaged over equal values.

    Between as many distinct points this is scikit-image's `match_histograms`: the k-th smallest takes the k-th
    smallest's place. Points that share a value cannot part; they stand for a range of shares of the whole, and take the
    mean of what the reference has in that range. scikit-image takes what lies at the upper end of the range, which
    sends the darker of two flat tones to the lighter one of the reference as soon as it covers a pixel more there.
    """
    values, levels = _distribution(x, weight)
    values_ref, levels_ref = _distribution(y, weight_ref)
    # Cut the shares at every level of either side: within a piece both sides have one value.
    ends = torch.cat([levels, levels_ref]).sort().values
    width = ends.diff(prepend=ends.new_zeros(1))
    place = torch.searchsorted(levels, ends).clamp_max(values.numel() - 1)
    place_ref = torch.searchsorted(levels_ref, ends).clamp_max(values_ref.numel() - 1)
    total = torch.zeros_like(values).index_add_(0, place, width)
    moved = torch.zeros_like(values).index_add_(0, place, width * values_ref[place_ref])
    # A weight too small to move the sum has no width of its own: it takes what lies at its level.
    alone = values_ref[torch.searchsorted(levels_ref, levels).clamp_max(values_ref.numel() - 1)]
    return _Curve(values, torch.where(total > 0, moved / total, alone))


def _distribution(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The values that have weight, rising and each once, and the share of the weight up to and with each."""
    inside = weight > 0
    values, place = x[inside].unique(return_inverse=True)
    mass = torch.zeros_like(values).index_add_(0, place, weight[inside])
    levels = mass.cumsum(0)
    return values, levels / levels[-1]


def _interpolate(x: Tensor, known: Tensor, value: Tensor) -> Tensor:
    """`numpy.interp`: piecewise linear through (known, value), constant beyond; `known` rises."""
    if known.numel() == 1:
        return value.expand_as(x)
    right = torch.searchsorted(known, x).clamp(1, known.numel() - 1)
    left = right - 1
    start, width = known[left], known[right] - known[left]
    share = ((x - start) / torch.where(width > 0, width, torch.ones_like(width))).clamp(0, 1)
    return torch.lerp(value[left], value[right], share)


def _fit_sliced(source: Samples, reference: Samples) -> Transport:
    source, reference = thinned(source, _PARTICLES), thinned(reference, _PARTICLES)
    channels = source.values.shape[0]
    generator = torch.Generator().manual_seed(0)
    axes = torch.eye(channels, dtype=torch.float64)
    steps, moved = [], source.values
    for _ in range(_ROTATIONS):
        turned = axes.to(moved)
        step = _fit_histogram(
            Samples(turned @ moved, source.weight), Samples(turned @ reference.values, reference.weight)
        )
        steps.append(step._replace(axes=turned))
        moved = steps[-1](moved)
        axes, _ = torch.linalg.qr(torch.randn(channels, channels, generator=generator, dtype=torch.float64))
    return _Chain(tuple(steps))


def thinned(found: Samples, count: int) -> Samples:
    """At most `count` of the points with weight, evenly spread over their order; the same for the same input."""
    inside = (found.weight > 0).nonzero().flatten()
    if inside.numel() > count:
        inside = inside[spread(inside.numel(), count, inside.device)]
    return Samples(found.values[:, inside], found.weight[inside])


def spread(total: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """`count` of the indices 0 to total - 1, rising: one of each of `count` equal intervals, the same on every device.

    Where in its interval is scattered by multiples of the golden ratio, because a fixed stride would always meet the
    same columns of a picture. In whole numbers, for float32 cannot count the pixels of a video.
    """
    step = torch.arange(count, device=device)
    within = (step * 40503) & 0xFFFF  # 65536 / golden ratio
    return step * total // count + (within * (total // count) >> 16)
