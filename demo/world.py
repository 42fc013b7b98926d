"""The demo world: *colour + texture + shape on background*, rendered so that the true answer is known.

A picture is a pure function of its `Factors`. `compose` exchanges factors between pictures, which gives the true
composition (appearance of B on the shape and pose of A over the background of C) that every method is judged by.

Conventions: pictures are float32 RGB in [0, 1], shape (H, W, 3), sRGB; masks are float32 coverage in [0, 1], shape
(H, W). Positions, radii and periods are fractions of the picture's side; angles are radians, counter-clockwise with
the y axis pointing down. Everything is deterministic from a seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .shapes import SHAPES, signed_distance

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "SHAPES",
    "SIZE",
    "TEXTURES",
    "TRAINED_SHAPES",
    "TRAINED_TEXTURES",
    "WITHHELD_SHAPES",
    "WITHHELD_TEXTURES",
    "Appearance",
    "Factors",
    "Pose",
    "Rendered",
    "background",
    "compose",
    "demo_pair",
    "mask",
    "prompt",
    "render",
    "sample",
    "value",
]

SIZE = 128
"""Side of a rendered picture in pixels; the demo model's native size."""

WITHHELD_SHAPES = ("heart", "fish", "mushroom", "leaf")
"""Shapes no model of the demo ever sees in training, neither by name nor by form."""
WITHHELD_TEXTURES = ("zigzag",)
TRAINED_SHAPES = tuple(name for name in SHAPES if name not in WITHHELD_SHAPES)

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.84, 0.10, 0.12),
    "orange": (0.96, 0.52, 0.08),
    "yellow": (0.96, 0.87, 0.12),
    "green": (0.12, 0.58, 0.18),
    "cyan": (0.10, 0.78, 0.82),
    "blue": (0.12, 0.22, 0.82),
    "purple": (0.52, 0.16, 0.68),
    "pink": (0.97, 0.48, 0.74),
}

BACKGROUNDS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "snow": ((0.95, 0.95, 0.96), (0.95, 0.95, 0.96)),
    "sand": ((0.82, 0.73, 0.58), (0.82, 0.73, 0.58)),
    "slate": ((0.42, 0.45, 0.48), (0.42, 0.45, 0.48)),
    "night": ((0.07, 0.08, 0.13), (0.07, 0.08, 0.13)),
    "sky": ((0.50, 0.68, 0.88), (0.90, 0.95, 0.98)),
    "dusk": ((0.20, 0.15, 0.32), (0.78, 0.52, 0.42)),
    "meadow": ((0.88, 0.90, 0.76), (0.42, 0.54, 0.34)),
    "dawn": ((0.90, 0.72, 0.72), (0.97, 0.92, 0.80)),
}
"""Name -> colour at the top and at the bottom; equal ends make a plain background, others a vertical gradient."""

_TEXTURE_PERIODS: dict[str, tuple[float, float]] = {
    "plain": (1.0, 1.0),
    "striped": (0.15, 0.20),
    "dotted": (0.16, 0.20),
    "checkered": (0.26, 0.34),
    "ringed": (0.15, 0.20),
    "shaded": (0.55, 0.70),
    "zigzag": (0.16, 0.20),
}
"""Name -> range of the period, as a fraction of the picture's side."""
TEXTURES = tuple(_TEXTURE_PERIODS)
TRAINED_TEXTURES = tuple(name for name in TEXTURES if name not in WITHHELD_TEXTURES)


@dataclass(frozen=True)
class Pose:
    """Where the shape sits: centre (x, y), radius and rotation."""

    x: float
    y: float
    radius: float
    rotation: float


@dataclass(frozen=True)
class Appearance:
    """What the shape is made of: two tones (sRGB) and how they alternate around the shape's centre."""

    colour: str
    texture: str
    tone: tuple[float, float, float]
    second_tone: tuple[float, float, float]
    period: float
    angle: float
    phase: float


@dataclass(frozen=True)
class Factors:
    """Everything a picture is made of."""

    shape: str
    pose: Pose
    appearance: Appearance
    background: str
    background_shift: tuple[float, float, float]


class Rendered(NamedTuple):
    """A picture (H, W, 3) in [0, 1] and the coverage of its object (H, W) in [0, 1]."""

    image: np.ndarray
    mask: np.ndarray


def sample(
    seed: int,
    *,
    shapes: tuple[str, ...] = TRAINED_SHAPES,
    textures: tuple[str, ...] = TRAINED_TEXTURES,
    colour: str | None = None,
    background: str | None = None,
) -> Factors:
    """Draw the factors of one picture. The same seed and vocabulary always give the same picture.

    `colour` and `background` replace what was drawn; all else stays what it is without them.
    """
    rng = np.random.default_rng(seed)
    radius = rng.uniform(0.31, 0.42)
    room = 0.5 - radius * 1.05
    pose = Pose(
        x=0.5 + rng.uniform(-room, room),
        y=0.5 + rng.uniform(-room, room),
        radius=radius,
        rotation=rng.uniform(-0.45, 0.45),
    )
    return Factors(
        shape=str(rng.choice(shapes)),
        pose=pose,
        appearance=_sample_appearance(rng, textures, colour),
        background=_choice(rng, tuple(BACKGROUNDS), background),
        background_shift=_triple(rng.uniform(-0.02, 0.02, 3)),
    )


def _choice(rng: np.random.Generator, names: tuple[str, ...], wanted: str | None) -> str:
    """One of the names, or the wanted one; the generator goes on alike."""
    drawn = str(rng.choice(names))
    return drawn if wanted is None else wanted


def _sample_appearance(rng: np.random.Generator, textures: tuple[str, ...], wanted: str | None) -> Appearance:
    colour = _choice(rng, tuple(COLOURS), wanted)
    texture = str(rng.choice(textures))
    tone = np.clip(np.array(COLOURS[colour]) + rng.uniform(-0.04, 0.04, 3), 0, 1)
    # The second tone keeps the hue, so that a texture never changes the colour's name.
    light = tone + (1 - tone) * rng.uniform(0.54, 0.62)
    dark = tone * rng.uniform(0.40, 0.48)
    second = light if rng.random() < 0.5 else dark
    return Appearance(
        colour=colour,
        texture=texture,
        tone=_triple(tone),
        second_tone=_triple(second),
        period=rng.uniform(*_TEXTURE_PERIODS[texture]),
        angle=rng.uniform(0, np.pi),
        phase=rng.uniform(0, 1),
    )


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])


def compose(shape_of: Factors, appearance_of: Factors, background_of: Factors) -> Factors:
    """The true composition: the shape and pose of A, the appearance of B, the background of C."""
    return replace(
        shape_of,
        appearance=appearance_of.appearance,
        background=background_of.background,
        background_shift=background_of.background_shift,
    )


def prompt(factors: Factors) -> str:
    """The caption the demo model is trained with, e.g. ``a red striped star on sky``."""
    look = factors.appearance
    return f"a {look.colour} {look.texture} {factors.shape} on {factors.background}"


def value(factors: Factors, name: str) -> str:
    """One of the four words of a caption: "shape", "colour", "texture" or "background"."""
    if name in ("shape", "background"):
        return getattr(factors, name)
    return getattr(factors.appearance, name)


def demo_pair() -> tuple[Factors, Factors]:
    """The two pictures `make demo` starts from: a shape the model has never seen, and an appearance it has."""
    shape = sample(313, shapes=("heart",), textures=("plain",))  # purple, on sky
    return shape, sample(25, shapes=("square",), textures=("striped", "dotted"))  # orange and brown, striped


def render(factors: Factors, size: int = SIZE) -> Rendered:
    """Draw the picture, anti-aliased, at size x size pixels."""
    if size < 8:
        raise ValueError(f"size is {size}, but a picture needs at least 8 pixels a side")
    if factors.background not in BACKGROUNDS:
        raise ValueError(f"unknown background {factors.background!r}; the world has {', '.join(BACKGROUNDS)}")
    x, y = _pixel_centres(size)
    coverage = mask(factors, size)
    foreground = _paint(factors.appearance, x - factors.pose.x, y - factors.pose.y, 1.0 / size)
    image = _backdrop(factors, y) * (1 - coverage[..., None]) + foreground * coverage[..., None]
    return Rendered(np.clip(image, 0, 1).astype(np.float32), coverage)


def background(factors: Factors, size: int = SIZE) -> np.ndarray:
    """The picture without its object: (size, size, 3) in [0, 1]."""
    image = np.broadcast_to(_backdrop(factors, _pixel_centres(size)[1]), (size, size, 3))
    return np.clip(image, 0, 1).astype(np.float32)


def _backdrop(factors: Factors, y: np.ndarray) -> np.ndarray:
    top, bottom = (np.array(end, dtype=np.float32) for end in BACKGROUNDS[factors.background])
    return top + (bottom - top) * y[..., None] + np.array(factors.background_shift, dtype=np.float32)


def mask(factors: Factors, size: int = SIZE) -> np.ndarray:
    """The object's coverage alone: (size, size) in [0, 1]."""
    x, y = _pixel_centres(size)
    pose = factors.pose
    dx, dy = x - pose.x, y - pose.y
    cos, sin = np.cos(pose.rotation), np.sin(pose.rotation)
    u, v = (dx * cos + dy * sin) / pose.radius, (dy * cos - dx * sin) / pose.radius
    distance = signed_distance(factors.shape, u, v) * pose.radius
    return np.clip(0.5 - distance * size, 0, 1).astype(np.float32)


def _pixel_centres(size: int) -> tuple[np.ndarray, np.ndarray]:
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(centres, centres)
    return x, y


def _paint(look: Appearance, dx: np.ndarray, dy: np.ndarray, pixel: float) -> np.ndarray:
    """Blend the two tones (H, W, 3) by the texture's coverage, anti-aliased over one pixel."""
    cos, sin = np.cos(look.angle), np.sin(look.angle)
    u, v = (dx * cos + dy * sin) / look.period, (dy * cos - dx * sin) / look.period
    blur = pixel / look.period
    if look.texture == "plain":
        share = np.zeros_like(dx)
    elif look.texture == "striped":
        share = _square_wave(u + look.phase, blur)
    elif look.texture == "ringed":
        share = _square_wave(np.hypot(u, v) + look.phase, blur)
    elif look.texture == "zigzag":
        share = _square_wave(u + look.phase + 0.9 * np.abs((v * 0.7) % 1.0 - 0.5), blur)
    elif look.texture == "checkered":
        a = 2 * _square_wave(u + look.phase, blur) - 1
        b = 2 * _square_wave(v + look.phase, blur) - 1
        share = 0.5 - 0.5 * a * b
    elif look.texture == "dotted":
        fx, fy = (u + look.phase) % 1.0 - 0.5, (v + look.phase) % 1.0 - 0.5
        share = np.clip(0.5 - (np.hypot(fx, fy) - 0.31) / blur, 0, 1)
    elif look.texture == "shaded":
        share = np.clip(0.5 + u, 0, 1)
    else:
        raise ValueError(f"unknown texture {look.texture!r}; the world has {', '.join(TEXTURES)}")
    tone, second = np.array(look.tone, dtype=np.float32), np.array(look.second_tone, dtype=np.float32)
    return tone + (second - tone) * share[..., None].astype(np.float32)


def _square_wave(t: np.ndarray, blur: float) -> np.ndarray:
    """1 on the first half of every period and 0 on the second; the edges are `blur` periods wide."""
    triangle = np.abs(t % 1.0 - 0.5) - 0.25
    return np.clip(0.5 - triangle / blur, 0, 1)
