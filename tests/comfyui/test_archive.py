"""What the registry gives to a user, in a ComfyUI that has nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

from demo import compose
from demo.client import ComfyClient
from demo.comfy import PACK
from demo.graph import load_graph, node_titled, with_inputs
from demo.server import ComfyServer, free_port

from ..hosts.test_registry import archive


def test_it_makes_the_demos_picture(tmp_path: Path) -> None:
    pack = tmp_path / "shape-appearance"
    for name in archive():
        (pack / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACK / name, pack / name)
    graph = with_inputs(load_graph(pack / compose.WORKFLOW.relative_to(PACK)), "KSampler", steps=2)
    with ComfyServer(free_port(), pack=pack) as server, ComfyClient(server.url) as client:
        (picture,) = client.fetch_images(client.run(graph), node_titled(graph, "Result"))
    assert picture.size == (128, 128)
