"""KV Injection on a diffusion transformer, the demo model's, in a real ComfyUI."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from demo.client import ComfyClient, ExecutionFailed

from .graphs import difference, injected, rendered

PACK = Path(__file__).resolve().parents[2]


def test_the_block_sweep_shows_what_each_block_does(client: ComfyClient) -> None:
    graph = json.loads((PACK / "workflows" / "api" / "block_sweep.json").read_text(encoding="utf-8"))
    client.free()
    for one in graph.values():
        if one["class_type"] == "KSampler":
            one["inputs"]["steps"] = 3
    outputs = client.run(graph)
    saved = {
        one["_meta"]["title"].removeprefix("Result: "): key
        for key, one in graph.items()
        if one["class_type"] == "SaveImage"
    }
    found = {name: np.asarray(client.fetch_images(outputs, key)[0].convert("RGB")) for name, key in saved.items()}
    assert found.keys() == {"none", *(f"block {i}" for i in range(5)), "all"}
    for first, second in combinations(found, 2):
        assert difference(found[first], found[second]) > 0.5, (first, second)


def test_ctrl_x_is_refused_with_what_there_is(client: ComfyClient) -> None:
    graph = injected(client.upload_image(rendered(3), "appearance.png"), preset="ctrl-x")
    graph["demo"]["inputs"]["network"] = "DiT"
    with pytest.raises(ExecutionFailed, match=r"ctrl-x.*no form for a diffusion transformer.*default, masactrl"):
        client.run(graph)
