"""Injection Report, the reference caches and references that hold several pictures, in a real ComfyUI."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo.client import ComfyClient, ExecutionFailed
from demo.server import ComfyServer, free_port

from .graphs import custom, difference, encoded, injected, node, pictures, rendered

PRESETS = ("default", "masactrl", "cross-image", "style-aligned", "visual-style", "style-id", "ctrl-x")


@pytest.fixture
def reference(client: ComfyClient) -> str:
    return client.upload_image(rendered(3), "appearance.png")


def reported(graph: dict[str, Any]) -> dict[str, Any]:
    graph = copy.deepcopy(graph)
    graph["report"] = node("ShapeAppearanceInjectionReport", model=["inject", 0], latent=["sampler", 0])
    graph["reading"] = node("SaveImage", images=["report", 2], filename_prefix="reading")
    return graph


def report(client: ComfyClient, graph: dict[str, Any]) -> str:
    return "".join(client.run(reported(graph))["report"]["text"])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_and_its_report_says_what_it_did(client: ComfyClient, reference: str, preset: str) -> None:
    graph = injected(reference, preset=preset)
    graph["sampler"]["inputs"]["steps"] = 6
    graph["inject"]["inputs"]["shape"] = ["encode", 0]
    text = report(client, graph)
    assert "rows through the model: 12 for the picture" in text
    lines = [line for line in text.splitlines() if line.startswith(("input.", "middle.", "output."))]
    assert lines
    assert any(float(line.split()[-1].rstrip("%")) > 0.1 for line in lines if line.endswith("%"))


def test_a_second_seed_costs_no_pass_over_the_reference(client: ComfyClient, reference: str) -> None:
    client.run(injected(reference))
    other = injected(reference)
    other["sampler"]["inputs"]["seed"] = 12345
    assert "4 for the picture, 0 for the references" in report(client, other)


def test_where_the_reference_was_read_is_a_picture(client: ComfyClient, reference: str) -> None:
    outputs = client.run(reported(injected(reference)))
    (picture,) = client.fetch_images(outputs, "reading")
    pixels = np.asarray(picture.convert("L"))
    assert pixels.shape == (256, 256)  # 16x16 cells of 16 pixels
    assert pixels.max() == 255
    assert pixels.std() > 1


def test_two_references_read_together_differ_from_either(client: ComfyClient, reference: str) -> None:
    second = client.upload_image(rendered(8), "second.png")

    def both(strength: float) -> dict[str, Any]:
        graph = injected(reference)
        graph["picture 2"] = node("LoadImage", image=second)
        graph["encode 2"] = encoded("picture 2", strength=strength, others=["encode", 0])
        graph["inject"]["inputs"]["appearance"] = ["encode 2", 0]
        return graph

    graphs = injected(reference), both(1.0), both(10.0)
    for graph in graphs:
        graph["sampler"]["inputs"]["steps"] = 8
    first_alone, mixed, second_mostly = (pictures(client, graph) for graph in graphs)
    assert difference(mixed, first_alone) > 1
    assert difference(second_mostly, mixed) > 1


def test_several_pictures_cannot_be_the_shape(client: ComfyClient, reference: str) -> None:
    graph = injected(reference)
    graph["encode 2"] = copy.deepcopy(graph["encode"])
    graph["encode 2"]["inputs"]["others"] = ["encode", 0]
    graph["inject"]["inputs"]["shape"] = ["encode 2", 0]
    with pytest.raises(ExecutionFailed, match="the shape reference holds 2 pictures") as failure:
        client.run(graph)
    assert failure.value.node_id == "inject"


def test_a_custom_preset_shows_the_blocks_of_the_model_and_is_used(client: ComfyClient, reference: str) -> None:
    graph = custom(reference, sites="output.2")
    graph["custom"]["inputs"]["model"] = ["demo", 0]
    graph["shown"] = node("PreviewAny", source=["custom", 0])
    outputs = client.run(reported(graph))
    assert "x output.2.0 (1/1)" in "".join(outputs["custom"]["text"])
    assert "- output.3.0 (1/1)" in "".join(outputs["custom"]["text"])
    assert [line.split()[0] for line in "".join(outputs["report"]["text"]).splitlines() if "output." in line] == [
        "output.2.0"
    ]


def test_a_report_before_any_run_says_what_to_connect(client: ComfyClient, reference: str) -> None:
    graph = injected(reference)
    graph["report"] = node("ShapeAppearanceInjectionReport", model=["demo", 0], latent=["size", 0])
    with pytest.raises(ExecutionFailed, match="carries no injection: connect the MODEL that comes out of KV Injection"):
        client.run(graph)


def test_a_saved_cache_spares_the_passes_after_a_restart(
    client: ComfyClient, server: ComfyServer, reference: str
) -> None:
    saving = injected(reference)
    saving["cache"] = node("ShapeAppearanceSaveReferenceCache", model=["inject", 0], latent=["sampler", 0], name="mine")
    outputs = client.run(saving)
    assert "passes over references in mine.safetensors" in "".join(outputs["cache"]["text"])
    file = server.base / "models" / "reference_caches" / "mine.safetensors"
    before = pictures(client, injected(reference))

    with ComfyServer(free_port()) as restarted, ComfyClient(restarted.url) as fresh:
        folder = restarted.base / "models" / "reference_caches"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file.name).write_bytes(file.read_bytes())
        (folder / "broken.safetensors").write_bytes(file.read_bytes()[:500])
        name = fresh.upload_image(rendered(3), "appearance.png")

        def loading(cache: str) -> dict[str, Any]:
            graph = injected(name)
            graph["load"] = node("ShapeAppearanceLoadReferenceCache", model=["demo", 0], name=cache)
            graph["inject"]["inputs"]["model"] = ["load", 0]
            return graph

        with pytest.raises(ExecutionFailed, match="damaged") as failure:
            fresh.run(loading("broken.safetensors"))
        assert failure.value.node_id == "load"
        assert "4 for the picture, 0 for the references" in report(fresh, loading(file.name))
        np.testing.assert_array_equal(pictures(fresh, loading(file.name)), before)


@pytest.mark.parametrize("name", ["", "../up", "a/b", "con:x"])
def test_a_cache_cannot_be_written_outside_its_folder(
    client: ComfyClient, server: ComfyServer, reference: str, name: str
) -> None:
    graph = injected(reference)
    graph["cache"] = node("ShapeAppearanceSaveReferenceCache", model=["inject", 0], latent=["sampler", 0], name=name)
    with pytest.raises(ExecutionFailed, match="cannot be the name of a file"):
        client.run(graph)
    assert not list(Path(server.base, "models").glob("*.safetensors"))


def test_a_flat_shape_needs_a_mask_and_loses_its_texture(client: ComfyClient, reference: str) -> None:
    graph = injected(reference)
    graph["shape"] = encoded("picture", flatten=1.0)
    graph["inject"]["inputs"]["shape"] = ["shape", 0]
    with pytest.raises(ExecutionFailed, match=r"flatten is 1\.0, but there is no mask") as failure:
        client.run(graph)
    assert failure.value.node_id == "shape"
