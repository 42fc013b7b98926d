"""Writes the English translation files from the nodes' schemas, and says which Chinese texts that leaves behind.

    .venv/bin/python scripts/locales.py               # locales/en, and a list of what is to be translated anew
    .venv/bin/python scripts/locales.py --translated  # ... and note that locales/zh says what the English now says

ComfyUI reads `nodeDefs.json` and `main.json` of every folder in `locales/`. The English ones are written by this
script alone; the Chinese ones by people. `locales/zh.sources.json` keeps a digest of the English text that each Chinese
one was made from, so that a tooltip which changes makes its translation stale. It is no folder, so ComfyUI passes over
it.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo.comfy import ensure_importable

LOCALES = ROOT / "locales"
ENGLISH, CHINESE = LOCALES / "en", LOCALES / "zh"
SOURCES = LOCALES / "zh.sources.json"
OWN_TYPES = "SHAPE_APPEARANCE_"
_PACK = "pack_of_locales"


def schemas() -> dict[str, dict[str, Any]]:
    """What ComfyUI tells the page of each node (`/object_info`), by node id; the pack is loaded as ComfyUI does it."""
    ensure_importable()
    spec = importlib.util.spec_from_file_location(_PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    pack = sys.modules[_PACK] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)

    async def nodes() -> list[Any]:
        return await (await pack.comfy_entrypoint()).get_node_list()

    infos = {}
    for node in asyncio.run(nodes()):
        node_id = node.GET_SCHEMA().node_id
        node.RELATIVE_PYTHON_MODULE = f"custom_nodes.{_PACK}"
        infos[node_id] = node.GET_NODE_INFO_V1()
    return infos


def node_definitions(infos: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`nodeDefs.json`. An output that is called as its type is has no name there: the page takes the type's."""
    found = {}
    for node_id, info in infos.items():
        entry: dict[str, Any] = {"display_name": info["display_name"], "description": info["description"]}
        inputs = {}
        for group in ("required", "optional"):
            for name, (_, *options) in info["input"].get(group, {}).items():
                inputs[name] = {"name": name, "tooltip": (options[0] if options else {}).get("tooltip") or ""}
        outputs = {}
        for index, (kind, name, tooltip) in enumerate(
            zip(info["output"], info["output_name"], info["output_tooltips"], strict=True)
        ):
            named = {} if name == kind else {"name": name}
            outputs[str(index)] = {**named, "tooltip": tooltip or ""}
        found[node_id] = {**entry, "inputs": inputs, "outputs": outputs}
    return found


def main_definitions(infos: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`main.json`: the parts of the nodes' categories, and the pack's own socket types."""
    categories = {part: part for info in infos.values() for part in info["category"].split("/")}
    types = {}
    for info in infos.values():
        given = [one[0] for group in ("required", "optional") for one in info["input"].get(group, {}).values()]
        for kind in (*given, *info["output"]):
            if isinstance(kind, str) and kind.startswith(OWN_TYPES):
                types[kind] = kind.removeprefix(OWN_TYPES)
    return {"nodeCategories": categories, "dataTypes": dict(sorted(types.items()))}


def english() -> dict[str, dict[str, Any]]:
    """The English files by name."""
    infos = schemas()
    return {"nodeDefs.json": node_definitions(infos), "main.json": main_definitions(infos)}


def texts(tree: dict[str, Any], at: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a file with its place, such as `KSampler.inputs.steps.tooltip`."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from texts(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(path: Path, tree: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", newline="\n")


def digests(files: dict[str, dict[str, Any]]) -> dict[str, str]:
    """By place: what a text said, in 12 hexadecimal digits."""
    return {
        place: hashlib.sha256(text.encode()).hexdigest()[:12] for tree in files.values() for place, text in texts(tree)
    }


def behind(files: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The places where the Chinese is missing, stale or of no use any more, each with the reason."""
    wanted, known = digests(files), read(SOURCES)
    there = {place for name in files for place, text in texts(read(CHINESE / name)) if text.strip()}
    reasons = {place: "is not translated" for place in wanted if place not in there}
    reasons |= {place: "is translated, but the English is gone" for place in there if place not in wanted}
    changed = {place for place in wanted if place in there and known.get(place) != wanted[place]}
    return reasons | dict.fromkeys(changed, "has changed in English since it was translated")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--translated", action="store_true", help="the Chinese files were brought up to date")
    arguments = parser.parse_args()
    files = english()
    for name, tree in files.items():
        write(ENGLISH / name, tree)
    if arguments.translated:
        write(SOURCES, digests(files))
    left = behind(files)
    said = dict(pair for tree in files.values() for pair in texts(tree))
    for place, reason in left.items():
        print(f"{place} {reason}: {said.get(place, '')}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
