"""Inputs that several nodes have alike."""

from __future__ import annotations

from comfy_api.latest import io


def share(name: str, default: float, tooltip: str) -> io.Float.Input:
    """A number between 0 and 1."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def window(start: float, start_tooltip: str, end: float, end_tooltip: str) -> list[io.Float.Input]:
    """Which part of the sampling something happens in."""
    return [share("start_percent", start, start_tooltip), share("end_percent", end, end_tooltip)]
