"""What another method made, its colours matched afterwards: AdaIN Color Match as the workflows end with it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from inversion_core.color import ColorMatch, Space, match_pictures
from inversion_core.statistics import Method as Transport

from .methods import Result, Studio
from .pairs import Pair


def recolored(
    made: Callable[[Studio, Pair], Result],
    studio: Studio,
    pair: Pair,
    *,
    method: Transport = "sliced_ot",
    space: Space = "linear_rgb",
) -> Result:
    """A method's picture, inside A's mask in the colours of what B's mask shows; outside not a bit is changed."""
    found = made(studio, pair)
    started = time.perf_counter()
    colours = torch.from_numpy(pair.appearance.image)[None]
    a, b = (torch.from_numpy(one.mask)[None] for one in (pair.shape, pair.appearance))
    picture = match_pictures(found.picture[None], colours, a, b, ColorMatch(method, space))[0]
    return found._replace(picture=picture, seconds=found.seconds + time.perf_counter() - started)
