"""Less memory while learning, whatever library the model's blocks are of: they keep their inputs only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from torch import nn
from torch.utils.checkpoint import checkpoint


class Opened(Protocol):
    """Says whether to save memory: see `LearningModel.checkpointing`."""

    checkpointing: Callable[[], AbstractContextManager[None]] | None


@contextmanager
def checkpointed(blocks: Iterable[nn.Module], opened: Opened) -> Iterator[None]:
    """While inside, the blocks compute again what gradients need whenever the opened model says so."""
    blocks = list(blocks)

    def sparing(plain: Callable) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            again = opened.checkpointing
            if again is None:
                return plain(*args, **kwargs)
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            return checkpoint(plain, *args, context_fn=lambda: (nullcontext(), again()), **options, **kwargs)

        return forward

    try:
        for block in blocks:
            # An attribute of the instance, which hides the class's method until it is deleted.
            block.forward = sparing(block.forward)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
