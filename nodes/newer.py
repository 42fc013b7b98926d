"""What later versions of ComfyUI let a node say, by feature test: on older ones it is left out."""

from __future__ import annotations

import inspect
from typing import Any

from comfy_api.latest import io

_OLD_ATTENTION = (
    "Shape & Appearance needs ComfyUI 0.3.60 or newer: this one has no way to edit a single attention call "
    "(comfy.ldm.modules.attention has no wrap_attn). Update ComfyUI."
)


def found_by(*words: str) -> dict[str, Any]:
    """For `io.Schema`: words beside its name by which the page's search finds a node."""
    known = "search_aliases" in inspect.signature(io.Schema).parameters
    return {"search_aliases": list(words)} if known else {}


def rarely_changed() -> dict[str, Any]:
    """For an input: the page shows it when asked for more inputs."""
    return {"advanced": True} if "advanced" in inspect.signature(io.Int.Input).parameters else {}


def require_editable_attention() -> None:
    """Refuse a ComfyUI without `optimized_attention_override`, on which the nodes would fail while they sample.

    Raises:
        ImportError: it is too old.
    """
    from comfy.ldm.modules import attention

    if not hasattr(attention, "wrap_attn"):
        raise ImportError(_OLD_ATTENTION)
