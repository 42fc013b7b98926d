"""The forms of the demo world as signed distance functions on the square [-1, 1]^2 (y down, negative inside)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Field = np.ndarray
Shape = Callable[[Field, Field], Field]


def signed_distance(name: str, x: Field, y: Field) -> Field:
    """Distance from each point to the outline of the named shape; negative inside.

    Exact for the primitives, a first-order approximation for unions and polar curves; always accurate near the
    outline, which is what anti-aliasing needs.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; the world has {', '.join(SHAPES)}")
    return SHAPES[name](x, y)


def _disc(x: Field, y: Field, cx: float, cy: float, r: float) -> Field:
    return np.hypot(x - cx, y - cy) - r


def _box(x: Field, y: Field, cx: float, cy: float, half_w: float, half_h: float) -> Field:
    dx, dy = np.abs(x - cx) - half_w, np.abs(y - cy) - half_h
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _ellipse(x: Field, y: Field, cx: float, cy: float, rx: float, ry: float) -> Field:
    u, v = (x - cx) / rx, (y - cy) / ry
    value = np.hypot(u, v)
    slope = np.hypot(u / rx, v / ry) / np.maximum(value, 1e-6)
    return (value - 1) / np.maximum(slope, 1e-6)


def _polygon(x: Field, y: Field, corners: Sequence[tuple[float, float]]) -> Field:
    squared = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = x - ax, y - ay
        t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        squared = np.minimum(squared, (wx - ex * t) ** 2 + (wy - ey * t) ** 2)
        crosses = (ay > y) != (by > y)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= crosses & (x < ex * (y - ay) / ey + ax)
    return np.where(inside, -1.0, 1.0) * np.sqrt(squared)


def _star_corners(points: int, outer: float, inner: float) -> list[tuple[float, float]]:
    angles = np.arange(2 * points) * np.pi / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2 == 0, outer, inner)
    return [(float(r * np.cos(a)), float(r * np.sin(a))) for a, r in zip(angles, radii, strict=True)]


def _flower(x: Field, y: Field) -> Field:
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    outline = 0.72 + 0.26 * np.cos(5 * angle + np.pi / 2)
    slope = -1.3 * np.sin(5 * angle + np.pi / 2)
    return (radius - outline) / np.sqrt(1 + (slope / np.maximum(radius, 0.3)) ** 2)


def _heart(x: Field, y: Field) -> Field:
    lobes = np.minimum(_disc(x, y, -0.45, -0.38, 0.5), _disc(x, y, 0.45, -0.38, 0.5))
    return np.minimum(lobes, _polygon(x, y, [(-0.86, -0.1), (0.0, -0.52), (0.86, -0.1), (0.0, 0.92)]))


def _fish(x: Field, y: Field) -> Field:
    tail = _polygon(x, y, [(0.35, 0.0), (0.98, -0.5), (0.84, 0.0), (0.98, 0.5)])
    return np.minimum(_ellipse(x, y, -0.26, 0.0, 0.72, 0.48), tail)


def _mushroom(x: Field, y: Field) -> Field:
    cap = np.maximum(_ellipse(x, y, 0.0, 0.05, 0.95, 0.85), y - 0.05)
    return np.minimum(cap, _box(x, y, 0.0, 0.45, 0.28, 0.45))


def _leaf(x: Field, y: Field) -> Field:
    return np.maximum(_disc(x, y, -0.72, 0.0, 1.22), _disc(x, y, 0.72, 0.0, 1.22))


SHAPES: dict[str, Shape] = {
    "circle": lambda x, y: _disc(x, y, 0, 0, 0.9),
    "square": lambda x, y: _box(x, y, 0, 0, 0.76, 0.76),
    "triangle": lambda x, y: _polygon(x, y, [(0.0, -0.95), (0.95, 0.75), (-0.95, 0.75)]),
    "star": lambda x, y: _polygon(x, y, _star_corners(5, 1.0, 0.42)),
    "cross": lambda x, y: np.minimum(_box(x, y, 0, 0, 0.95, 0.32), _box(x, y, 0, 0, 0.32, 0.95)),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.68) - 0.27,
    "moon": lambda x, y: np.maximum(_disc(x, y, 0.05, 0, 0.95), -_disc(x, y, 0.52, 0, 0.72)),
    "arrow": lambda x, y: _polygon(
        x, y, [(0, -0.98), (0.85, -0.08), (0.33, -0.08), (0.33, 0.92), (-0.33, 0.92), (-0.33, -0.08), (-0.85, -0.08)]
    ),
    "bar": lambda x, y: _box(x, y, 0, 0, 0.98, 0.34),
    "flower": _flower,
    "house": lambda x, y: _polygon(
        x, y, [(0, -0.98), (0.98, -0.12), (0.6, -0.12), (0.6, 0.85), (-0.6, 0.85), (-0.6, -0.12), (-0.98, -0.12)]
    ),
    "bolt": lambda x, y: _polygon(
        x, y, [(0.45, -0.98), (-0.8, 0.2), (-0.12, 0.2), (-0.5, 0.98), (0.8, -0.3), (0.12, -0.3)]
    ),
    "heart": _heart,
    "fish": _fish,
    "mushroom": _mushroom,
    "leaf": _leaf,
}
"""Name -> signed distance function. Forms keep about the unit disc; the triangle's lower corners reach 1.21."""
