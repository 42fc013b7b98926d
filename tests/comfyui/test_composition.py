"""The main job on the real server: shape of one picture, appearance of another, judged by the true answer.

Needs the trained weights in demo/safetensors.
"""

import copy

import numpy as np
import pytest
from PIL import Image

from demo import compose
from demo.client import ComfyClient, Progress
from demo.comfy import find_comfyui
from demo.graph import Graph, load_graph, node_titled, with_inputs, with_picture

from .graphs import difference

SHAPE_IOU = 0.8
"""The goal set for the demo pair."""
APPEARANCE = 0.5
"""Half the way from A's own appearance (0) to the true one (1)."""


@pytest.fixture(scope="module")
def job() -> compose.Job:
    return compose.plan(compose.parse([]))


@pytest.fixture
def graph(client: ComfyClient, job: compose.Job) -> Graph:
    """What `make demo` posts."""
    ready = compose.edit(load_graph(compose.WORKFLOW), compose.parse([]), job, find_comfyui())
    for title, picture in (("Shape image", job.shape), ("Appearance image", job.appearance)):
        name = client.upload_image(picture, f"{title.split()[0].lower()}.png")
        ready = with_picture(ready, title, name)
    return ready


def results(client: ComfyClient, graph: Graph, seen: list[Progress] | None = None) -> list[Image.Image]:
    outputs = client.run(graph, None if seen is None else seen.append)
    return client.fetch_images(outputs, node_titled(graph, "Result"))


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image.convert("RGB")) for image in images])


def without(graph: Graph, title: str = "KV Injection", through: str = "model") -> Graph:
    """Whatever took what came through it takes what it was given."""
    plain = copy.deepcopy(graph)
    name = node_titled(plain, title)
    given = plain.pop(name)["inputs"][through]
    for node in plain.values():
        node["inputs"] = {key: given if value == [name, 0] else value for key, value in node["inputs"].items()}
    return plain


def test_the_picture_has_the_shape_of_one_and_the_appearance_of_the_other(
    client: ComfyClient, graph: Graph, job: compose.Job
) -> None:
    assert job.score is not None
    (picture,) = results(client, graph)
    scores = job.score(picture)
    assert scores["shape_iou"] >= SHAPE_IOU, scores
    assert scores["appearance"] >= APPEARANCE, scores


def test_without_our_nodes_the_same_workflow_does_not_make_it(
    client: ComfyClient, graph: Graph, job: compose.Job
) -> None:
    """The prompt names the place alone; were these scores high, the ones above would prove nothing."""
    assert job.score is not None
    plain = without(without(graph), "Colours of the appearance", "image")
    (picture,) = results(client, plain)
    scores = job.score(picture)
    assert min(scores["shape_iou"] / SHAPE_IOU, scores["appearance"] / APPEARANCE) < 0.75, scores


def test_strength_zero_is_the_workflow_without_the_node(client: ComfyClient, graph: Graph) -> None:
    neutral = pixels(results(client, with_inputs(graph, "KV Injection", strength=0.0)))
    np.testing.assert_array_equal(neutral, pixels(results(client, without(graph))))
    assert difference(neutral, pixels(results(client, graph))) > 1


def test_the_same_prompt_gives_the_same_picture_whatever_ran_between(client: ComfyClient, graph: Graph) -> None:
    """The models stay loaded; what the nodes gave is dropped, so that the sampler really runs again."""
    first = pixels(results(client, graph))
    results(client, with_inputs(graph, "KV Injection", strength=0.5, preset="style-aligned"))
    results(client, without(graph))
    client.free()
    seen: list[Progress] = []
    again = pixels(results(client, graph, seen))
    assert node_titled(graph, "KSampler") in {one.node_id for one in seen}
    np.testing.assert_array_equal(again, first)


def test_every_picture_of_a_batch_is_the_composition(client: ComfyClient, graph: Graph, job: compose.Job) -> None:
    assert job.score is not None
    pictures = results(client, with_inputs(graph, "Size", batch_size=3))
    scores = [job.score(picture) for picture in pictures]
    assert len(scores) == 3
    assert min(one["shape_iou"] for one in scores) >= SHAPE_IOU, scores
    assert min(one["appearance"] for one in scores) >= APPEARANCE, scores
    made = pixels(pictures)
    assert difference(made[0], made[1]) > 0.5
    assert difference(made[1], made[2]) > 0.5
    assert difference(made[:1], pixels(results(client, graph))) < 0.5
