"""Makes what ComfyUI's page opens (`workflows/*.json`) from the API forms and the notes, and the pictures beside them.

    .venv/bin/python scripts/workflows.py                     # all pages
    .venv/bin/python scripts/workflows.py --run [NAME ...]    # ... then run them (or these) and draw their thumbnails

`workflows/api/<name>.json` says what is computed, `workflows/notes/<name>.md` what an artist is told. A real server
says what its nodes look like.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo.client import ComfyClient
from demo.files import replace_file
from demo.graph import Graph, load_graph
from demo.server import ComfyServer, free_port
from scripts.workflow_page import Promoted, Subgraph, page
from scripts.workflow_picture import thumbnail

PAGES = ROOT / "workflows"
APIS = PAGES / "api"
NOTES = PAGES / "notes"

SUBGRAPHS = {
    "compose": Subgraph(
        "10",
        "Compose",
        (
            Promoted("model", (("27", "model"),)),
            Promoted("vae", (("21", "vae"), ("22", "vae"), ("24", "vae"), ("29", "vae"))),
            Promoted("positive", (("28", "positive"),)),
            Promoted("negative", (("28", "negative"),)),
            Promoted("shape image", (("21", "image"),)),
            Promoted("shape mask", (("21", "mask"), ("23", "mask"), ("34", "mask"))),
            Promoted("appearance image", (("22", "image"), ("34", "reference"))),
            Promoted("appearance mask", (("22", "mask"), ("34", "reference_mask"))),
            Promoted("place", (("24", "pixels"), ("33", "destination"))),
            Promoted("shape", (("27", "shape_strength"),)),
            Promoted("appearance", (("27", "strength"), ("34", "strength"))),
        ),
        (Promoted("picture", (("34", 0),)),),
    )
}
"""Which workflows have nodes folded into one, and what it shows outside."""


def names() -> list[str]:
    """Every workflow that has a note for artists, and so a page; others are for programs alone."""
    return sorted(path.stem for path in NOTES.glob("*.md"))


def made(name: str, definitions: dict[str, Any]) -> str:
    """The text of `workflows/<name>.json`."""
    note = (NOTES / f"{name}.md").read_text(encoding="utf-8").strip()
    drawn = page(name, load_graph(APIS / f"{name}.json"), note, definitions, SUBGRAPHS.get(name))
    return json.dumps(drawn, indent=1, ensure_ascii=False) + "\n"


def definitions_of(client: ComfyClient, graph: Graph) -> dict[str, Any]:
    """What a running server says of the nodes in a graph; unknown ones are left out."""
    found = {kind: client.object_info(kind) for kind in {node["class_type"] for node in graph.values()}}
    return {kind: info for kind, info in found.items() if info is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="*", metavar="NAME", help="run these, or all, and draw thumbnails")
    options = parser.parse_args()
    with ComfyServer(free_port()) as server, ComfyClient(server.url) as client:
        for name in names():
            text = made(name, definitions_of(client, load_graph(APIS / f"{name}.json")))
            replace_file(PAGES / f"{name}.json", lambda path, text=text: path.write_text(text, encoding="utf-8"))
            print(f"workflows/{name}.json", flush=True)
        for name in [] if options.run is None else options.run or names():
            graph = load_graph(APIS / f"{name}.json")
            client.free()  # else a picture that an earlier workflow drew alike is not shown again
            picture = thumbnail(graph, client, client.run(graph))
            replace_file(PAGES / f"{name}.jpg", lambda path, picture=picture: picture.save(path, "JPEG", quality=92))
            print(f"workflows/{name}.jpg", flush=True)


if __name__ == "__main__":
    main()
