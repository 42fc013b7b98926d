"""What later versions of ComfyUI let a node say is said there, and left out here."""

from __future__ import annotations

from typing import Any

import pytest

from .test_nodes_in_process import module


class LaterSchema:
    def __init__(self, node_id: str, search_aliases: Any = None) -> None: ...


class LaterInt:
    class Input:
        def __init__(self, id: str, advanced: Any = None) -> None: ...


class LaterIo:
    Schema, Int = LaterSchema, LaterInt


def test_search_words_and_advanced_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = module("nodes.newer")
    monkeypatch.setattr(newer, "io", LaterIo)
    assert newer.found_by("dino", "vit") == {"search_aliases": ["dino", "vit"]}
    assert newer.rarely_changed() == {"advanced": True}


def test_where_there_are_none_the_nodes_are_as_before() -> None:
    """Schemas that ComfyUI takes: an unknown word would be a TypeError."""
    newer = module("nodes.newer")
    newer.io.Schema(node_id="x", **newer.found_by("dino"))
    newer.io.Int.Input("x", **newer.rarely_changed())


def test_a_comfyui_whose_attention_cannot_be_edited_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy.ldm.modules import attention

    newer = module("nodes.newer")
    newer.require_editable_attention()
    monkeypatch.delattr(attention, "wrap_attn")
    with pytest.raises(ImportError, match=r"0\.3\.60 or newer.*Update ComfyUI"):
        newer.require_editable_attention()
