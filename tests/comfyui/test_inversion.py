"""Learning, keeping and using an inversion on the real server, with the demo model.

The trainings are too short to learn anything: what is tested is that the nodes hang together.
"""

import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo import world
from demo.client import ComfyClient, ExecutionFailed, ExecutionInterrupted, Progress
from demo.server import ComfyServer
from inversion_core.learning.recipes import SPENDING

from .graphs import Node, difference, node, pictures, rendered, text_to_image

VARIANTS = SPENDING["fast"].variants
"""Told as progress before the first step."""
COMMON = {"class_word": "shape", "quality": "fast", "seed": 0, "size": 512}


def learning(client: ComfyClient, *, kind: str = "Shape", steps: int = 3, **inputs: Any) -> dict[str, Node]:
    """A picture, half of it masked, and the node that learns from it; its report is kept as "report"."""
    name = client.upload_image(rendered(3), "concept.png")
    extra = {"objective": "attention"} if kind == "Appearance" else {}
    values: dict[str, Any] = {"token": "thing", "steps": steps, **COMMON, **extra, **inputs}
    return {
        "demo": node("ShapeAppearanceLoadDemoModel"),
        "picture": node("LoadImage", image=name),
        "mask": node("SolidMask", value=1.0, width=64, height=64),
        "learn": node(
            f"ShapeAppearance{kind}Inversion",
            model=["demo", 0],
            clip=["demo", 1],
            vae=["demo", 2],
            images=["picture", 0],
            **{"mask": ["mask", 0], **values},
        ),
        "report": node("PreviewAny", source=["learn", 2]),
        "plot": node("SaveImage", images=["learn", 1], filename_prefix="plot"),
    }


def applied(graph: dict[str, Node], inversion: list, text: str = "a red <thing> on snow") -> dict[str, Node]:
    """The graph with a picture sampled through Apply Inversion."""
    joined = {**graph, **{name: one for name, one in text_to_image(text, steps=2).items() if name not in graph}}
    joined["apply"] = node(
        "ShapeAppearanceApplyInversion",
        model=["demo", 0],
        clip=["demo", 1],
        inversion=inversion,
        token_strength=1.0,
        offset_strength=1.0,
    )
    joined["positive"]["inputs"]["clip"] = ["apply", 1]
    joined["sampler"]["inputs"]["model"] = ["apply", 0]
    return joined


def saving(graph: dict[str, Node], name: str, **inputs: Any) -> dict[str, Node]:
    values = {"filename": name, "stock_files": True, "overwrite": False, **inputs}
    return {**graph, "keep": node("ShapeAppearanceSaveInversion", inversion=["learn", 0], **values)}


def report(client: ComfyClient, graph: dict[str, Node]) -> str:
    return client.run(graph)["report"]["text"][0]


def failure(client: ComfyClient, graph: dict[str, Node], where: str) -> str:
    with pytest.raises(ExecutionFailed) as failed:
        client.run(graph)
    assert failed.value.node_id == where
    return failed.value.message


def names(folder: Path) -> list[str]:
    """Of the files in a folder that need not be there."""
    return sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []


def state(server: ComfyServer, folder: str) -> list[Path]:
    found = server.base / "user" / "shape_appearance" / folder
    return sorted(found.iterdir()) if found.is_dir() else []


def test_learn_save_and_use_by_our_nodes_and_by_stock_ones(client: ComfyClient, server: ComfyServer) -> None:
    folders = [server.base / "models" / name for name in ("inversions", "embeddings", "loras")]
    before = [set(names(folder)) for folder in folders]
    learned = saving(learning(client), "round-trip")
    ours = pictures(client, applied(learned, ["learn", 0]))
    # For those who have no page: in the log, how far it is and how long it will take.
    assert re.search(r"<thing> .*: loss [\d.e-]+, \d+:\d\d left, 3 of 3 steps", server.log_text())

    # Other tests share the server and keep files of their own there.
    assert [set(names(folder)) - kept for folder, kept in zip(folders, before, strict=True)] == [
        {"round-trip.safetensors"},
        {"thing.safetensors"},
        {"round-trip.safetensors"},
    ]
    loaded = {
        "demo": node("ShapeAppearanceLoadDemoModel"),
        "load": node("ShapeAppearanceLoadInversion", inversion="round-trip.safetensors"),
        "about": node("PreviewAny", source=["load", 1]),
    }
    np.testing.assert_array_equal(pictures(client, applied(loaded, ["load", 0])), ours)
    assert "shape <thing>" in client.run(loaded)["about"]["text"][0]

    stock = text_to_image("a red embedding:thing on snow", steps=2)
    stock["lora"] = node("LoraLoaderModelOnly", model=["demo", 0], lora_name="round-trip.safetensors", strength_model=1)
    stock["sampler"]["inputs"]["model"] = ["lora", 0]
    np.testing.assert_array_equal(pictures(client, stock), ours)

    plain = pictures(client, text_to_image("a red shape on snow", steps=2))
    assert difference(plain, ours) > 0


def test_without_a_mask_one_is_proposed_and_shown(client: ComfyClient) -> None:
    graph = learning(client, token="<star>")
    del graph["learn"]["inputs"]["mask"]
    graph["shown"] = node("MaskToImage", mask=["learn", 3])
    graph["save"] = node("SaveImage", images=["shown", 0], filename_prefix="mask")
    outputs = client.run(graph)
    assert outputs["learn"]["images"]
    found = np.asarray(client.fetch_images(outputs, "save")[0].convert("L")) > 127
    truth = world.render(world.sample(3)).mask > 0.5
    assert (found & truth).sum() / (found | truth).sum() > 0.6


def test_an_appearance_is_learned_beside_a_frozen_shape(client: ComfyClient) -> None:
    graph = learning(client, token="form")
    graph["look"] = learning(client, kind="Appearance", token="look", shape=["learn", 0])["learn"]
    both = applied(graph, ["learn", 0], "a <look> <form> on snow")
    both["second"] = node(
        "ShapeAppearanceApplyInversion",
        model=["apply", 0],
        clip=["apply", 1],
        inversion=["look", 0],
        token_strength=1.0,
        offset_strength=1.0,
    )
    both["positive"]["inputs"]["clip"] = ["second", 1]
    both["sampler"]["inputs"]["model"] = ["second", 0]
    assert pictures(client, both).shape == (1, 128, 128, 3)


def test_what_was_learned_before_is_not_learned_again(client: ComfyClient, server: ComfyServer) -> None:
    graph = learning(client, token="again")
    assert "3 steps in" in report(client, graph)
    # The node runs once more, on the same pictures: these are smaller than both sizes.
    graph["learn"]["inputs"]["size"] = 640
    assert "learned before" in report(client, graph)
    assert "3 steps in" in report(client, learning(client, token="again", seed=1))
    assert not state(server, "unfinished")


def test_cancel_stops_it_leaves_nothing_half_done_and_the_next_run_goes_on(
    client: ComfyClient, server: ComfyServer
) -> None:
    graph, seen, under_way = learning(client, token="long", steps=500), [], threading.Event()

    def watch(progress: Progress) -> None:
        seen.append(progress)
        if progress.node_id == "learn" and progress.value > VARIANTS:
            under_way.set()

    def cancel() -> None:
        under_way.wait(120)
        with ComfyClient(server.url) as other:
            other.interrupt()

    before = state(server, "learned")
    canceller = threading.Thread(target=cancel)
    canceller.start()
    with pytest.raises(ExecutionInterrupted):
        client.run(graph, watch)
    canceller.join()
    assert max(one.value for one in seen if one.node_id == "learn") < VARIANTS + 50
    assert state(server, "learned") == before
    assert [path.suffix for path in state(server, "unfinished")] == [".safetensors"]
    assert pictures(client, text_to_image(steps=1)).shape == (1, 128, 128, 3)


def test_bad_input_is_refused_with_the_way_out(client: ComfyClient) -> None:
    empty = learning(client)
    empty["mask"]["inputs"]["value"] = 0.0
    assert "empty" in failure(client, empty, "learn")
    assert "cannot be used in prompts" in failure(client, learning(client, token="a thing"), "learn")
    assert "write <star>" in failure(client, learning(client, token="star"), "learn")
    assert "gives no token" in failure(client, learning(client, class_word=""), "learn")
    twice = saving(learning(client, token="twice"), "twice")
    client.run(twice)
    twice["keep"]["inputs"]["stock_files"] = False
    assert "is there already" in failure(client, twice, "keep")
    twice["keep"]["inputs"]["overwrite"] = True
    assert client.run(twice)
    twice["keep"]["inputs"]["filename"] = "../twice"
    assert "cannot be the name" in failure(client, twice, "keep")
