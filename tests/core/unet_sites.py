"""The self-attentions of the published UNets."""

from inversion_core.sites import Site

_SD15_ENCODER = ((1, 1), (2, 1), (4, 2), (5, 2), (7, 4), (8, 4))
_SD15_DECODER = tuple(zip(range(3, 12), (4, 4, 4, 2, 2, 2, 1, 1, 1), strict=True))
SD15 = [
    *(Site("input", number, 0, scale) for number, scale in _SD15_ENCODER),
    Site("middle", 0, 0, 8),
    *(Site("output", number, 0, scale) for number, scale in _SD15_DECODER),
]
"""16 of them."""

_SDXL_ENCODER = ((4, 2, 2), (5, 2, 2), (7, 4, 10), (8, 4, 10))
SDXL = [
    *(Site("input", number, i, scale) for number, scale, depth in _SDXL_ENCODER for i in range(depth)),
    *(Site("middle", 0, i, 4) for i in range(10)),
    *(Site("output", number, i, 4) for number in range(3) for i in range(10)),
    *(Site("output", number, i, 2) for number in range(3, 6) for i in range(2)),
]
"""70 of them."""
