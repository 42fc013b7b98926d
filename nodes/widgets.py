"""Inputs that several nodes have alike."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io


def share(name: str, default: float, tooltip: str, **options: Any) -> io.Float.Input:
    """A number between 0 and 1."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip, **options)


def method_strength() -> io.Float.Input:
    """Of everything that an injection does."""
    return share(
        "strength",
        1.0,
        "1 is the method in full. Lower it if too much of the appearance picture is copied. 0 is exactly the model "
        "without this node.",
    )


def window(start: float, start_tooltip: str, end: float, end_tooltip: str) -> list[io.Float.Input]:
    """Which part of the sampling something happens in."""
    return [share("start_percent", start, start_tooltip), share("end_percent", end, end_tooltip)]


def fixed_seed(name: str, tooltip: str, **options: Any) -> io.Int.Input:
    """A seed that stays as it is from run to run: by default the page draws a new one for everything called a seed,
    and a reference, or a training of many minutes, would be made anew each time."""
    return io.Int.Input(name, default=0, min=0, max=2**53, control_after_generate=False, tooltip=tooltip, **options)
