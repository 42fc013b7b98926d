"""What Preview Features and Preview Correspondence draw."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inversion_core.correspondence import Correspondence, rearranged
from ..inversion_core.features import Features, principal_colors
from .sheet import Panel, heat, marked, overlaid, sheet

_CORNERS = ((0.90, 0.15, 0.20), (0.98, 0.85, 0.20), (0.20, 0.30, 0.95), (0.15, 0.80, 0.45))
"""Top left, top right, bottom left, bottom right."""


def features_sheet(pictures: Tensor, features: Features, x: float, y: float) -> Tensor:
    """A row for each picture (B, H, W, 3): itself, its keys' main directions as colours, its likeness to a point.

    The point, in shares of width and height, lies in the first picture; colours mean the same in all of them.
    """
    h, w = features.grid
    keys = features.descriptors("keys").float().cpu()
    colours = principal_colors(keys.flatten(0, 1)).view(-1, h, w, 3)
    unit = F.normalize(keys, dim=2)
    chosen = unit[0, min(int(y * h), h - 1) * w + min(int(x * w), w - 1)]
    likeness = (unit @ chosen).view(-1, h, w)
    low, high = float(likeness.min()), float(likeness.max())
    rows = []
    for i, picture in enumerate(pictures):
        own = marked(picture, x, y) if i == 0 else picture
        warm = overlaid(picture, heat(likeness[i], low, high))
        rows.append(
            [
                Panel("picture, and the point" if i == 0 else "picture", own),
                Panel("same colour = same kind of part", overlaid(picture, colours[i], 1.0)),
                Panel("bright = like the point", marked(warm, x, y) if i == 0 else warm),
            ]
        )
    return sheet(rows)


def correspondence_sheet(
    shape: Tensor, appearance: Tensor, pair: Correspondence, shape_mask: Tensor | None, appearance_mask: Tensor | None
) -> Tensor:
    """Two rows of three panels. Pictures are (H, W, 3), masks (H, W) over them."""
    places = _place_colours(pair, appearance_mask)
    most = pair.at(pair.grid, pair.reference_grid).index[:, 0].cpu()
    found = places.view(-1, 3)[most].view(*pair.grid, 3)
    sure = heat(pair.confidence().view(pair.grid).cpu(), 0, 1)
    moved = warped(appearance, pair)
    appearance_colours = overlaid(appearance, places)
    rows = (
        (
            Panel("shape", _dimmed(shape, shape_mask)),
            Panel("appearance", _dimmed(appearance, appearance_mask)),
            Panel("appearance, where the shape reads it", _dimmed(moved, shape_mask)),
        ),
        (
            Panel("shape, coloured by what it reads most ...", _dimmed(overlaid(shape, found), shape_mask)),
            Panel("... in the appearance", _dimmed(appearance_colours, appearance_mask)),
            Panel("bright = a sure match", _dimmed(overlaid(shape, sure), shape_mask)),
        ),
    )
    return sheet(rows)


def warped(appearance: Tensor, pair: Correspondence) -> Tensor:
    """The appearance picture (H, W, 3) laid out like the shape, (h, w, 3)."""
    picture = appearance.movedim(-1, 0)[None].to(pair.device)
    return rearranged(picture, pair)[0].movedim(0, -1).clamp(0, 1).cpu()


def _place_colours(pair: Correspondence, mask: Tensor | None) -> Tensor:
    """(h, w, 3): a colour for each place of the appearance, from corner to corner of what may be read."""
    h, w = pair.reference_grid
    y, x = ((torch.arange(side) + 0.5) / side for side in (h, w))
    if mask is not None:
        inside = F.interpolate(mask[None, None].float().cpu(), size=(h, w), mode="area")[0, 0] > 0.5
        if bool(inside.any()):
            y, x = (_stretched(places, inside.any(dim)) for places, dim in ((y, 1), (x, 0)))
    corners = torch.tensor(_CORNERS)
    across = x[None, :, None]
    return torch.lerp(
        torch.lerp(corners[0], corners[1], across), torch.lerp(corners[2], corners[3], across), y[:, None, None]
    )


def _stretched(places: Tensor, used: Tensor) -> Tensor:
    """Places such that the used ones span 0 to 1."""
    low, high = places[used].min(), places[used].max()
    return ((places - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)


def _dimmed(picture: Tensor, mask: Tensor | None) -> Tensor:
    """The picture, darker where the mask is 0."""
    if mask is None:
        return picture
    size = (picture.shape[0], picture.shape[1])
    fitted = F.interpolate(mask[None, None].float().cpu(), size=size, mode="bilinear", antialias=True)[0, 0, ..., None]
    return picture * (0.25 + 0.75 * fitted)
