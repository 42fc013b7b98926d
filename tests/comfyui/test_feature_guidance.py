"""Cross-Feature Attention and Self-Similarity Guidance on the real server, with the demo's models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from demo import world
from demo.client import ComfyClient, ExecutionFailed

from .graphs import Node, difference, encoded, node, pictures, text_to_image
from .test_features import upload


@pytest.fixture
def graph(client: ComfyClient) -> dict[str, Node]:
    """The demo's pair, read and looked at; the sampler has the plain model."""
    a, b = world.demo_pair()
    return {
        **text_to_image(steps=5),
        "load": node("ShapeAppearanceLoadFeatureExtractor", backbone="demo-vit", precision="float32", download=False),
        "a": node("LoadImage", image=upload(client, a, "shape.png")),
        "b": node("LoadImage", image=upload(client, b, "appearance.png")),
        "shape": encoded("a", mask=["a", 1]),
        "appearance": encoded("b", mask=["b", 1]),
    }


def patched(graph: dict[str, Node], one: Node) -> dict[str, Node]:
    sampler = graph["sampler"]
    return {**graph, "patch": one, "sampler": {**sampler, "inputs": {**sampler["inputs"], "model": ["patch", 0]}}}


def crossed(graph: dict[str, Node], **inputs: Any) -> dict[str, Node]:
    values: dict[str, Any] = {"model": ["demo", 0], "appearance": ["appearance", 0], "shape": ["shape", 0]}
    values |= {"features": ["load", 0], "strength": 1.0, "share": 1.0, "rest": "queries", "start_percent": 0.0}
    values |= {"end_percent": 0.5, "sites": "all", "temperature": 0.1, "top_k": 16, "balance": 1.0, "refresh": 0}
    values |= {"compare": "tokens", "shape_strength": 1.0, "color": 1.0, "block": -1, "size": 0}
    return patched(graph, node("ShapeAppearanceCrossFeatureAttention", **{**values, **inputs}))


def guided(graph: dict[str, Node], **inputs: Any) -> dict[str, Node]:
    values: dict[str, Any] = {"model": ["demo", 0], "shape": ["a", 0], "features": ["load", 0], "vae": ["demo", 2]}
    values |= {"strength": 1.0, "start_percent": 0.0, "end_percent": 0.8, "repeats": 1, "appearance_weight": 0.0}
    values |= {"block": -1, "size": 0}
    return patched(graph, node("ShapeAppearanceSelfSimilarityGuidance", **{**values, **inputs}))


@pytest.mark.parametrize("patch", [crossed, guided])
def test_strength_zero_is_the_plain_model(client: ComfyClient, graph: dict[str, Node], patch: Any) -> None:
    assert difference(pictures(client, patch(graph, strength=0.0)), pictures(client, graph)) == 0


def test_features_put_the_appearance_where_the_shape_is(client: ComfyClient, graph: dict[str, Node]) -> None:
    """The colours of the object are B's, and those around it are not."""
    a, b = (world.render(one) for one in world.demo_pair())
    wanted, own = (one.image[one.mask > 0.9].mean(0) * 255 for one in (b, a))
    found = np.asarray(pictures(client, crossed(graph)), dtype=np.float64).reshape(128, 128, 3)
    inside = found[a.mask > 0.9].mean(0)
    assert np.abs(inside - wanted).mean() < 0.5 * np.abs(own - wanted).mean()
    assert np.abs(found[a.mask < 0.1].mean(0) - wanted).mean() > 20


def test_the_reading_may_be_mixed_and_matched_anew(client: ComfyClient, graph: dict[str, Node]) -> None:
    features, mixed, own, anew = (
        pictures(client, crossed(graph, **inputs))
        for inputs in (
            {"end_percent": 1.0},
            {"end_percent": 1.0, "share": 0.5},
            {"end_percent": 0.5, "rest": "own"},
            {"end_percent": 1.0, "refresh": 1, "vae": ["demo", 2]},
        )
    )
    assert min(difference(features, other) for other in (mixed, own, anew)) > 0.1


def test_guidance_changes_the_picture_and_works_beside_kv_injection(
    client: ComfyClient, graph: dict[str, Node]
) -> None:
    plain, alone = pictures(client, graph), pictures(client, guided(graph))
    assert difference(alone, plain) > 1
    values = {"preset": "default", "strength": 1.0, "shape_strength": 1.0, "color": 1.0}
    kv = node("ShapeAppearanceKVInjection", model=["demo", 0], appearance=["appearance", 0], **values)
    both = guided({**graph, "kv": kv}, model=["kv", 0], appearance=["b", 0], appearance_weight=0.5)
    assert difference(pictures(client, both), alone) > 1


@pytest.mark.parametrize(
    ("patch", "inputs", "message"),
    [
        (crossed, {"refresh": 2}, "refresh is 2.*needs a VAE"),
        (crossed, {"sites": "decoder.nowhere"}, "nowhere"),
        (guided, {"appearance_weight": 0.5}, "needs an appearance picture"),
        (guided, {"start_percent": 0.9, "end_percent": 0.2}, "window is 0.9 to 0.2"),
    ],
    ids=lambda one: None,
)
def test_what_cannot_be_done_is_said(
    client: ComfyClient, graph: dict[str, Node], patch: Any, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExecutionFailed, match=message):
        client.run(patch(graph, **inputs))
