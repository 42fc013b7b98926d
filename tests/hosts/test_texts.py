"""What artists read: translations of every name and tooltip, and help pages, none missing and none stale."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from demo.comfy import PACK
from scripts import help_pictures, locales

HELP = PACK / "web" / "docs"
HAN = re.compile(r"[\u4e00-\u9fff]")
FILES = ("nodeDefs.json", "main.json")
INPUTS = {"en": "## Inputs", "zh": "## 输入"}
RERUN = "run scripts/locales.py"
OF_COMFYUI = {"加载CLIP视觉", "加载LoRA"}


@cache
def english() -> dict[str, dict[str, Any]]:
    return locales.english()


@cache
def committed(language: str, name: str) -> dict[str, Any]:
    return locales.read(locales.LOCALES / language / name)


def node_ids() -> list[str]:
    """From the English file, so that no ComfyUI is loaded to collect the tests; a first test compares it."""
    return list(committed("en", "nodeDefs.json"))


@pytest.mark.parametrize("name", FILES)
def test_the_english_files_say_what_the_nodes_say(name: str) -> None:
    assert committed("en", name) == english()[name], RERUN


def test_every_text_is_there() -> None:
    empty = [place for name in FILES for place, text in locales.texts(english()[name]) if not text.strip()]
    assert not empty, "these have no text: write one in the node's schema"


def test_the_chinese_is_complete_and_of_the_present_english() -> None:
    assert locales.behind(english()) == {}, f"{RERUN}, translate what it lists, then run it with --translated"


def test_a_changed_a_new_and_a_lost_text_are_noticed() -> None:
    """What the test above relies on."""
    files = {name: dict(english()[name]) for name in FILES}
    nodes = files["nodeDefs.json"]
    changed, lost = list(nodes)[:2]
    nodes[changed] = {**nodes[changed], "description": "says something else"}
    nodes["New"] = {"display_name": "New", "description": "", "inputs": {}, "outputs": {}}
    del nodes[lost]
    found = locales.behind(files)
    assert "has changed" in found[f"{changed}.description"]
    assert "not translated" in found["New.display_name"]
    assert "gone" in found[f"{lost}.display_name"]


def test_what_is_a_sentence_is_in_chinese() -> None:
    for place, text in locales.texts(committed("zh", "nodeDefs.json")):
        if not place.endswith(".name"):
            assert HAN.search(text), f"{place} is not Chinese: {text}"
    for place, text in locales.texts(committed("zh", "main.json")):
        assert HAN.search(text), f"{place} is not Chinese: {text}"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_text_holds_what_the_page_would_interpret(language: str) -> None:
    """vue-i18n takes braces for a value to put in, @ for a link and | for a plural; the text would come out broken."""
    for name in FILES:
        for place, text in locales.texts(committed(language, name)):
            assert not set("{}@|") & set(text), f"{place}: {text}"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_names_are_told_apart(language: str) -> None:
    """No two nodes, and no two inputs of one node, are called the same."""
    nodes = committed(language, "nodeDefs.json")
    for group in (nodes, *(node["inputs"] for node in nodes.values())):
        names = [entry.get("display_name", entry.get("name")) for entry in group.values()]
        assert len(names) == len(set(names)), names


def test_help_pages_are_of_the_nodes_there_are() -> None:
    assert sorted(path.name for path in HELP.iterdir()) == sorted(node_ids())


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("node_id", node_ids())
def test_each_node_has_a_help_page_that_names_its_inputs_rightly(node_id: str, language: str) -> None:
    page = (HELP / node_id / f"{language}.md").read_text(encoding="utf-8")
    node = committed(language, "nodeDefs.json")[node_id]
    assert page.startswith(f"# {node['display_name']}\n")
    assert bool(HAN.search(page)) == (language == "zh")
    if not node["inputs"]:
        assert INPUTS[language] not in page
        return
    section = page.split(INPUTS[language] + "\n")[1].split("\n## ")[0]
    lead = [re.split("[:：]", line)[0] for line in section.splitlines() if line.startswith("- ")]
    assert lead
    for line in lead:
        if language == "en":
            found = [(name, name) for name in re.findall(r"\*\*(.+?)\*\*", line)]
        else:
            found = [(key, name) for name, key in re.findall(r"\*\*(.+?)\*\*（`(.+?)`）", line)]
        assert found, line
        for key, name in found:
            assert key in node["inputs"], f"{node_id} has no input {key}"
            assert node["inputs"][key]["name"] == name


@pytest.mark.parametrize("node_id", node_ids())
def test_both_languages_speak_of_the_same_inputs_and_papers(node_id: str) -> None:
    pages = [(HELP / node_id / f"{language}.md").read_text(encoding="utf-8") for language in ("en", "zh")]
    english_page, chinese_page = pages
    explained = re.findall(r"\*\*(\w+)\*\*", english_page.split("## Inputs")[-1].split("\n## ")[0])
    chinese_section = chinese_page.split("## 输入")[-1].split("\n## ")[0]
    if "## Inputs" in english_page:
        assert sorted(explained) == sorted(re.findall(r"\*\*（`(.+?)`）", chinese_section))
    papers, numbers = ([sorted(re.findall(pattern, page)) for page in pages] for pattern in (r"\d{4}\.\d{5}", "\n## "))
    assert papers[0] == papers[1]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("node_id", node_ids())
def test_each_help_page_shows_what_its_node_does(node_id: str, language: str) -> None:
    """ComfyUI's page looks for pictures below the docs folder, whatever folder the text lies in."""
    page = (HELP / node_id / f"{language}.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[(.+?)\]\((.+?)\)", page)
    if node_id.removeprefix(help_pictures.PREFIX) in help_pictures.WITHOUT:
        assert shown == []
        return
    assert [path for _, path in shown] == [f"{node_id}/picture.webp"], "run scripts/help_pictures.py"
    assert bool(HAN.search(shown[0][0])) == (language == "zh")
    assert (HELP / shown[0][1]).stat().st_size <= help_pictures.MAX_BYTES


def test_pages_link_to_nothing_that_is_not_there() -> None:
    """Pages name files of the pack, such as docs/color.md."""
    for path in HELP.rglob("*.md"):
        named = re.findall(r"\b(?:docs|workflows|inversion_core)/[\w/.]+\.\w+", path.read_text(encoding="utf-8"))
        for name in named:
            assert Path(PACK / name).is_file(), f"{path.name} of {path.parent.name} names {name}"


def test_chinese_texts_call_things_by_their_translated_names() -> None:
    """What stands in Chinese quotation marks is a node, an input or an output, and called as the page calls it."""
    nodes = committed("zh", "nodeDefs.json")
    known = {text for place, text in locales.texts(nodes) if place.endswith("name")} | OF_COMFYUI
    pages = {str(path): path.read_text(encoding="utf-8") for path in HELP.rglob("zh.md")}
    for where, text in [*locales.texts(nodes), *pages.items()]:
        for name in re.findall("“(.+?)”", text):
            assert name in known, f"{where}: {name}"
