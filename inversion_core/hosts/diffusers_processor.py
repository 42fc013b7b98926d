"""How both diffusers hosts stand around a layer's own attention processor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Around:
    """A layer's processor within a block: `around` is called in place of the one that the layer had.

    Args:
        layer: whose processor it becomes once it is set.
        around: told the layer's former processor and what the layer gives a processor; returns what a processor does.
    """

    def __init__(self, layer: Any, around: Callable[..., Any]) -> None:
        self._layer, self._inner = layer, layer.processor
        inner: Any = self._inner

        @functools.wraps(inner.__call__)
        def call(*args: Any, **kwargs: Any) -> Any:
            return around(inner, *args, **kwargs)

        self._call = call

    @property
    def __call__(self) -> Callable[..., Any]:
        # diffusers passes on only those keyword arguments that this signature names: they must be the inner one's.
        return self._call

    def detach(self) -> None:
        """Give the layer back the processor that it had, unless somebody has given it another one since."""
        if self._layer.processor is self:
            self._layer.set_processor(self._inner)
