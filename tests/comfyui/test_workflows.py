"""Every workflow of the pack, on the real server: its two forms say the same, and it runs as it is opened."""

import json
import os
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import grey_dilation

from demo.client import ComfyClient
from demo.graph import Graph, load_graph, node_titled, with_inputs
from demo.server import PACK_NAME, ComfyServer
from scripts import workflows

NAMES = workflows.names()
VIRTUAL = ("MarkdownNote", "Note")
IN, OUT = -10, -20
"""Ids of a subgraph's own ends."""
LEARNING = ("learned_and_injected", "learned_shape_and_appearance")
"""These train for minutes as shipped; here for a few steps, which changes nothing in what is connected to what."""
FEW = 4


def opened(name: str) -> dict[str, Any]:
    return json.loads((workflows.PAGES / f"{name}.json").read_text(encoding="utf-8"))


def posted(page: dict[str, Any]) -> Graph:
    """What the page would post: read from its own lists alone, independently of the script that wrote them."""
    folded = {one["id"]: one for one in page.get("definitions", {}).get("subgraphs", ())}
    outer = {node["id"]: node for node in page["nodes"]}
    links = {link[0]: link for link in page["links"]}

    def origin(number: int) -> list:
        _, key, slot, *_ = links[number]
        if outer[key]["type"] not in folded:
            return [str(key), slot]
        inside = folded[outer[key]["type"]]
        (link,) = (one for one in inside["links"] if (one["target_id"], one["target_slot"]) == (OUT, slot))
        assert inside["outputs"][slot]["linkIds"] == [link["id"]]
        return [f"{key}:{link['origin_id']}", link["origin_slot"]]

    found: Graph = {}
    for key, node in outer.items():
        if node["type"] in folded:
            given = {slot["name"]: origin(slot["link"]) for slot in node["inputs"]}
            sliders = [name for _, name in node["properties"]["proxyWidgets"]]
            given |= dict(zip(sliders, node["widgets_values"], strict=True))
            found |= unfolded(key, folded[node["type"]], given)
        elif node["type"] not in VIRTUAL:
            found[str(key)] = plain(node, origin)
    return found


def unfolded(key: int, subgraph: dict[str, Any], given: dict[str, Any]) -> Graph:
    """The nodes inside, with what comes from outside put in."""
    links = {link["id"]: link for link in subgraph["links"]}

    def origin(number: int) -> Any:
        link = links[number]
        if link["origin_id"] != IN:
            return [f"{key}:{link['origin_id']}", link["origin_slot"]]
        port = subgraph["inputs"][link["origin_slot"]]
        assert number in port["linkIds"]
        return given[port["name"]]

    return {f"{key}:{node['id']}": plain(node, origin) for node in subgraph["nodes"]}


def plain(node: dict[str, Any], origin: Callable[[int], Any]) -> dict[str, Any]:
    """One node: its widgets' values in order, then its links, which win."""
    values, inputs = iter(node["widgets_values"]), {}
    for slot in node["inputs"]:
        if "widget" in slot:
            inputs[slot["name"]] = next(values)
            if slot["name"] in ("seed", "noise_seed") and not node["type"].startswith("ShapeAppearance"):
                assert next(values) == "fixed"  # "control after generate": a shipped picture can be made again
        if slot["link"] is not None:
            inputs[slot["name"]] = origin(slot["link"])
    assert not list(values)
    return {"class_type": node["type"], "inputs": inputs}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.skipif(bool(os.environ.get("COMFYUI_PATH")), reason="the stock nodes of other versions have other sockets")
def test_the_page_form_is_what_the_script_makes_of_the_api_form(client: ComfyClient, name: str) -> None:
    known = workflows.definitions_of(client, load_graph(workflows.APIS / f"{name}.json"))
    said = (workflows.PAGES / f"{name}.json").read_text(encoding="utf-8")
    assert said == workflows.made(name, known), "run scripts/workflows.py"


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_compute_the_same(name: str) -> None:
    written = load_graph(workflows.APIS / f"{name}.json")
    assert posted(opened(name)) == {
        key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in written.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_it_has_a_note_that_is_seen_and_a_square_picture(name: str) -> None:
    (note,) = (node for node in opened(name)["nodes"] if node["type"] in VIRTUAL)
    assert "Load Image" in note["widgets_values"][0]
    with Image.open(workflows.PAGES / f"{name}.jpg") as picture:
        assert picture.width == picture.height
        assert np.asarray(picture.convert("L")).std() > 10


def test_no_page_is_left_without_its_api_form() -> None:
    assert sorted(path.stem for path in workflows.PAGES.glob("*.json")) == NAMES
    assert {path.stem for path in workflows.APIS.glob("*.json")} >= set(NAMES)


def shortened(name: str) -> Graph:
    graph = load_graph(workflows.APIS / f"{name}.json")
    for kind in ("Shape Inversion", "Appearance Inversion"):
        if name in LEARNING and any(node["_meta"]["title"] == kind for node in graph.values()):
            graph = with_inputs(graph, kind, steps=FEW, quality="fast")
    return graph


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_to_pictures_as_it_is_opened(client: ComfyClient, name: str) -> None:
    graph = shortened(name)
    client.free()
    outputs = client.run(graph)
    saving = [key for key, node in graph.items() if node["class_type"] == "SaveImage"]
    assert saving
    for key in saving:
        pictures = client.fetch_images(outputs, key)
        assert pictures
        for picture in pictures:
            assert np.asarray(picture.convert("RGB"), dtype=np.float32).std() > 5


@pytest.mark.parametrize("name", ["place_on_picture", "compose"])
def test_outside_the_feather_the_place_is_what_it_was(client: ComfyClient, name: str) -> None:
    """The place is saved beside the result, in the same bytes, and so is the shape's mask."""
    graph = load_graph(workflows.APIS / f"{name}.json")
    room = graph[node_titled(graph, "Room around the shape")]["inputs"]["expand"]
    feather = graph[node_titled(graph, "Feather")]["inputs"]["blur_radius"]
    links = {"90": [node_titled(graph, "Place"), 0], "91": [node_titled(graph, "Mask as picture"), 0]}
    graph[links["91"][0]]["inputs"]["mask"] = [node_titled(graph, "Shape image"), 1]  # not yet grown
    graph[node_titled(graph, "Feather")]["inputs"]["image"] = ["92", 0]
    grown = [node_titled(graph, "Room around the shape"), 0]
    graph["92"] = {"class_type": "MaskToImage", "inputs": {"mask": grown}, "_meta": {"title": "Grown"}}
    for key, link in links.items():
        graph[key] = {"class_type": "SaveImage", "inputs": {"images": link, "filename_prefix": "compared"}}
    client.free()  # what an earlier test made would not be shown again
    outputs = client.run(graph)
    keys = (node_titled(graph, "Result"), "90", "91")
    result, before, shape = (np.asarray(client.fetch_images(outputs, key)[0].convert("RGB")) for key in keys)
    # Saved in 8 bits, a coverage below 1/255 is 0: one pixel more.
    reach = 2 * (room + feather + 1) + 1
    outside = ~grey_dilation(shape[..., 0] > 0, size=(reach, reach)).astype(bool)
    assert 0.15 < outside.mean() < 0.9
    np.testing.assert_array_equal(result[outside], before[outside])
    assert (np.abs(result.astype(int) - before).max(-1) > 30)[shape[..., 0] > 0].mean() > 0.8


def test_each_appearance_of_the_batch_gives_its_own_picture(client: ComfyClient) -> None:
    graph = load_graph(workflows.APIS / "several_appearances.json")
    graph = with_inputs(graph, "KSampler", steps=4)
    client.free()
    outputs = client.run(graph)
    made = [np.asarray(one.convert("RGB"), int) for one in client.fetch_images(outputs, node_titled(graph, "Results"))]
    assert len(made) == 3
    assert min(np.abs(made[i] - made[j]).mean() for i, j in ((0, 1), (0, 2), (1, 2))) > 5


def test_the_template_browser_lists_the_pages_and_nothing_else(server: ComfyServer) -> None:
    with urllib.request.urlopen(f"{server.url}/workflow_templates") as answer:
        assert sorted(json.load(answer)[PACK_NAME]) == NAMES
    for name in NAMES:
        with urllib.request.urlopen(f"{server.url}/api/workflow_templates/{PACK_NAME}/{name}.jpg") as answer:
            assert answer.headers["Content-Type"] == "image/jpeg"
