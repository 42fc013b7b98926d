"""The pack in ComfyUI's page, in a real browser: found, opened, linked, explained, run, refused and stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from demo import compose
from demo.comfy import PACK
from demo.graph import load_graph, with_inputs, with_picture

from ..comfyui.graphs import injected, node, rendered
from .page import SCREENSHOTS, ComfyPage

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
NAMES = json.loads((PACK / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
FOLDER = "shape-appearance"
"""The name of the pack's folder among the custom nodes: the page lists its templates under it."""


def demo_workflow(page: ComfyPage) -> dict[str, Any]:
    """What `make demo` runs, with fewer steps."""
    job = compose.plan(compose.parse([]))
    graph = with_inputs(load_graph(compose.WORKFLOW), "Prompt", text=job.prompt)
    graph = with_inputs(graph, "KSampler", steps=4)
    graph = with_picture(graph, "Shape image", page.upload(job.shape, "shape.png"))
    return with_picture(graph, "Appearance image", page.upload(job.appearance, "appearance.png"))


def learning(page: ComfyPage, steps: int) -> dict[str, Any]:
    name = page.upload(rendered(3), "concept.png")
    inputs = {"token": "thing", "class_word": "shape", "steps": steps, "quality": "fast", "seed": 0, "size": 512}
    links: dict[str, Any] = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "images": ["2", 0], "mask": ["3", 0]}
    return {
        "1": node("ShapeAppearanceLoadDemoModel"),
        "2": node("LoadImage", image=name),
        "3": node("SolidMask", value=1.0, width=64, height=64),
        "4": node("ShapeAppearanceShapeInversion", **links, **inputs),
        "5": node("SaveImage", images=["4", 1], filename_prefix="plot"),
    }


def test_nodes_are_found_by_their_words_and_added(page: ComfyPage) -> None:
    """By a double click on the canvas, as most people do it."""
    page.open_search(700, 450)
    page.page.keyboard.type("kv inj", delay=20)
    page.page.get_by_role("option").filter(has_text="KV Injection").first.click()
    page.wait_for("app.graph._nodes.length === 1")
    assert page.kinds() == ["ShapeAppearanceKVInjection"]


def test_a_node_is_dragged_in_from_the_library(page: ComfyPage) -> None:
    page.page.keyboard.press("n")
    page.panel.get_by_placeholder("Search").first.fill("encode reference")
    found = page.library_nodes.filter(has_text="Encode Reference").first
    found.drag_to(page.page.locator("#graph-canvas"), target_position={"x": 800, "y": 400})
    page.wait_for("app.graph._nodes.length === 1")
    assert page.kinds() == ["ShapeAppearanceEncodeReference"]


def test_all_nodes_of_the_pack_are_in_the_page(page: ComfyPage) -> None:
    titles = page.evaluate("ids => ids.map(id => LiteGraph.registered_node_types[id]?.title)", list(NAMES))
    assert titles == [entry["display_name"] for entry in NAMES.values()]


def test_seeds_of_references_and_trainings_stay_as_they_are(page: ComfyPage) -> None:
    """Or each click on Run would learn for minutes again."""
    widgets = "id => app.graph.getNodeById(id).widgets.map(widget => widget.name)"
    seeds = {"EncodeReference": "noise_seed", "InvertReference": "noise_seed", "ShapeInversion": "seed"}
    for name, seed in seeds.items():
        shown = page.evaluate(widgets, page.add(f"ShapeAppearance{name}", 300, 200))
        assert seed in shown and "control_after_generate" not in shown
    assert "control_after_generate" in page.evaluate(widgets, page.add("KSampler", 300, 200))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_workflow_opens_from_the_template_browser(page: ComfyPage, path: Path) -> None:
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.dialog.get_by_text(FOLDER, exact=True).first.click()
    page.page.get_by_test_id(f"template-workflow-{path.stem}").click()
    wanted = [node["type"] for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]]
    page.wait_for(f"app.graph._nodes.length === {len(wanted)}")
    assert page.red() == []
    page.dialog.wait_for(state="detached")
    assert page.alerts.all_inner_texts() == []
    assert sorted(page.kinds()) == sorted(wanted)
    posted = page.evaluate("async () => (await app.graphToPrompt()).output")
    written = load_graph(path.parent / "api" / path.name)
    assert {key: (one["class_type"], one["inputs"]) for key, one in posted.items()} == {
        key: (one["class_type"], one["inputs"]) for key, one in written.items()
    }


def test_a_slider_of_compose_reaches_every_node_it_stands_for(page: ComfyPage) -> None:
    (path,) = (one for one in WORKFLOWS if one.stem == "compose")
    page.evaluate("async graph => { await app.loadGraphData(graph) }", json.loads(path.read_text(encoding="utf-8")))
    page.evaluate(
        """() => {
            const compose = app.graph._nodes.find(node => node.title === 'Compose')
            compose.widgets.find(widget => widget.name === 'appearance').value = 0.25
        }"""
    )
    posted = page.evaluate("async () => (await app.graphToPrompt()).output").values()
    strengths = {one["class_type"]: one["inputs"].get("strength") for one in posted}
    assert strengths["ShapeAppearanceKVInjection"] == strengths["ShapeAppearanceAdaINColorMatch"] == 0.25


def test_a_workflow_with_a_node_that_nobody_has_would_be_noticed(page: ComfyPage) -> None:
    """What the test above relies on."""
    page.open(demo_workflow(page))
    graph = json.loads(page.evaluate("JSON.stringify(app.graph.serialize())"))
    graph["nodes"][0]["type"] = "NoSuchNode"
    page.evaluate("async graph => { await app.loadGraphData(graph) }", graph)
    page.told("NoSuchNode")
    assert page.red() == ["NoSuchNode"]


@pytest.mark.parametrize(
    ("source", "output", "target", "given", "fits"),
    [
        ("EncodeReference", "reference", "KVInjection", "appearance", True),
        ("EncodeReference", "reference", "KVInjection", "shape", True),
        ("EncodeReference", "reference", "KVInjection", "model", False),
        ("EncodeReference", "reference", "KVInjection", "custom", False),
        ("CustomPreset", "preset", "KVInjection", "custom", True),
        ("CustomPreset", "preset", "KVInjection", "appearance", False),
        ("LoadInversion", "inversion", "ApplyInversion", "inversion", True),
        ("LoadInversion", "inversion", "KVInjection", "custom", False),
        ("LoadFeatureExtractor", "features", "PreviewFeatures", "features", True),
        ("LoadDemoModel", "MODEL", "EncodeReference", "vae", False),
    ],
)
def test_sockets_connect_to_their_own_kind_alone(
    page: ComfyPage, source: str, output: str, target: str, given: str, fits: bool
) -> None:
    start = page.add(f"ShapeAppearance{source}", 120, 200)
    end = page.add(f"ShapeAppearance{target}", 650, 200)
    page.connect((start, output), (end, given))
    assert page.linked((end, given)) is fits


def test_run_brings_a_picture_into_the_page(page: ComfyPage) -> None:
    page.open(demo_workflow(page))
    page.run()
    saved = "app.graph._nodes.find(node => node.type === 'SaveImage')"
    assert page.wait_for(f"{saved}.imgs?.[0]?.naturalWidth") == 128
    assert "type=output" in page.evaluate(f"{saved}.imgs[0].src")
    assert page.failed() is None


def test_a_wrong_input_shows_our_message_on_the_right_node(page: ComfyPage) -> None:
    graph = injected(page.upload(rendered(3), "reference.png"))
    graph["mask"] = node("SolidMask", value=0.0, width=128, height=128)
    graph["encode"]["inputs"]["mask"] = ["mask", 0]
    page.open(graph)
    page.run()
    assert "disconnect the mask" in page.told("the mask (128x128) is empty")
    assert page.failed() == "encode"


def test_training_shows_its_progress_and_cancel_stops_it(page: ComfyPage) -> None:
    page.open(learning(page, steps=200))
    page.run()
    learner = "app.graph.getNodeById(4)"
    page.wait_for(f"{learner}.progress > 0")
    # The curve with the loss and the time left, and beside it a rough picture: in the node, after some steps.
    page.wait_for(f"{learner}.imgs?.[0]?.naturalWidth")
    assert page.evaluate(f"{learner}.imgs[0].naturalWidth > {learner}.imgs[0].naturalHeight")
    page.screenshot(SCREENSHOTS / "training.png")
    page.cancel()
    page.wait_until_idle()
    assert page.evaluate(f"{learner}.progress ?? 0") < 1
    last = list(page.page.request.get(f"{page.url}/history").json().values())[-1]
    assert [event for event, _ in last["status"]["messages"]][-1] == "execution_interrupted"


def test_the_help_page_opens_in_both_languages(page: ComfyPage) -> None:
    """Last: the page is loaded anew for the other language. The names on the node are not looked at: the page of
    ComfyUI 0.3.75 overwrites the packs' translations by its own after it has merged them."""
    for language, title, inputs in (("en", "KV Injection", "Inputs"), ("zh", "KV 注入", "输入")):
        if language != "en":
            page.set_setting("Comfy.Locale", language)
            page.visit()
        page.clear()
        one = page.add("ShapeAppearanceKVInjection", 700, 300)
        page.evaluate("id => app.canvas.selectNode(app.graph.getNodeById(id))", one)
        page.open_help()
        page.help.get_by_role("heading", name=inputs, exact=True).wait_for()
        assert title in page.help.inner_text()
        picture = page.help.get_by_role("img").first
        picture.scroll_into_view_if_needed()
        assert picture.evaluate("async image => { await image.decode(); return image.naturalWidth }") > 0
        page.screenshot(SCREENSHOTS / f"help_{language}.png")
