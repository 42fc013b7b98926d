"""Translations and help pages as a page of ComfyUI fetches them."""

import json
from typing import Any
from urllib.request import urlopen

import pytest

from demo.client import ComfyClient
from demo.comfy import PACK
from demo.server import ComfyServer

NODE = "ShapeAppearanceKVInjection"


def fetched(server: ComfyServer, path: str) -> str:
    with urlopen(f"{server.url}{path}") as answer:
        return answer.read().decode("utf-8")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_server_offers_our_translations(server: ComfyServer, language: str) -> None:
    offered: dict[str, Any] = json.loads(fetched(server, "/i18n"))[language]
    folder = PACK / "locales" / language
    assert offered["nodeDefs"] == json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))
    for key, value in json.loads((folder / "main.json").read_text(encoding="utf-8")).items():
        assert offered[key] == value


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_server_offers_our_help_pages(server: ComfyServer, client: ComfyClient, language: str) -> None:
    """At the address that the page makes of the node's module."""
    info = client.object_info(NODE)
    assert info is not None
    pack = info["python_module"].removeprefix("custom_nodes.")
    page = fetched(server, f"/extensions/{pack}/docs/{NODE}/{language}.md")
    assert page == (PACK / "web" / "docs" / NODE / f"{language}.md").read_text(encoding="utf-8")
