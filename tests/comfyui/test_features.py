"""Load Feature Extractor, the previews and Composition Score on the real server."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from demo import world
from demo.client import ComfyClient, ExecutionFailed

from .graphs import node


def upload(client: ComfyClient, factors: world.Factors, name: str) -> str:
    """As LoadImage takes it: alpha 0 is the object."""
    rendered = world.render(factors)
    image = Image.fromarray(np.uint8(np.round(rendered.image * 255)))
    image.putalpha(Image.fromarray(np.uint8(np.round((1 - rendered.mask) * 255))))
    return client.upload_image(image, name)


@pytest.fixture
def graph(client: ComfyClient) -> dict[str, Any]:
    """The demo's backbone and the demo's pair."""
    a, b = world.demo_pair()
    return {
        "load": node("ShapeAppearanceLoadFeatureExtractor", backbone="demo-vit", precision="float32", download=False),
        "a": node("LoadImage", image=upload(client, a, "shape.png")),
        "b": node("LoadImage", image=upload(client, b, "appearance.png")),
    }


def images(client: ComfyClient, graph: dict[str, Any], source: str, output: int = 0) -> np.ndarray:
    """One output of a node as (H, W, 3) in [0, 1]."""
    ready = {**graph, "save": node("SaveImage", images=[source, output], filename_prefix="features")}
    (image,) = client.fetch_images(client.run(ready), "save")
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255


def matched(**inputs: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"temperature": 0.1, "top_k": 16, "balance": 1.0, "compare": "tokens"}
    values |= {"block": -1, "size": 0, "shape": ["a", 0], "appearance": ["b", 0], "features": ["load", 0]}
    values |= {"shape_mask": ["a", 1], "appearance_mask": ["b", 1]}
    return node("ShapeAppearancePreviewCorrespondence", **{**values, **inputs})


def seen(**inputs: Any) -> dict[str, Any]:
    values = {"features": ["load", 0], "image": ["a", 0], "x": 0.5, "y": 0.5, "block": -1, "size": 0}
    return node("ShapeAppearancePreviewFeatures", **{**values, **inputs})


def test_the_feature_preview_is_bright_where_it_is_like_the_point(client: ComfyClient, graph: dict[str, Any]) -> None:
    a, _ = world.demo_pair()
    inside = world.render(a).mask
    sheet = images(client, {**graph, "see": seen(x=a.pose.x, y=a.pose.y)}, "see")
    gap, caption, side = 10, 24, 320
    assert sheet.shape == (caption + side + 2 * gap, 3 * (side + gap) + gap, 3)
    left = 2 * (side + gap) + gap
    heat = sheet[gap + caption : gap + caption + side, left : left + side].mean(-1)
    ground = np.asarray(Image.fromarray(inside).resize((side, side))) < 0.1
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    near = np.hypot(x - a.pose.x, y - a.pose.y) < 0.4 * a.pose.radius
    assert heat[near].mean() > heat[ground].mean() + 0.1


def test_a_batch_gets_a_row_each(client: ComfyClient, graph: dict[str, Any]) -> None:
    batch = node("ImageBatch", image1=["a", 0], image2=["b", 0])
    sheet = images(client, {**graph, "batch": batch, "see": seen(image=["batch", 0])}, "see")
    assert sheet.shape[0] == 10 + 2 * (24 + 320 + 10)


def test_the_appearance_is_laid_out_like_the_shape(client: ComfyClient, graph: dict[str, Any]) -> None:
    a, b = world.demo_pair()
    moved = images(client, {**graph, "match": matched()}, "match", 1)
    assert moved.shape == (world.SIZE, world.SIZE, 3)
    inside, source = world.render(a).mask > 0.99, world.render(b)
    wanted = source.image[source.mask > 0.99]
    # Only the object is read, so what comes has its colours, but for tokens on its edge, which show some ground too.
    within = (moved[inside] >= wanted.min(0) - 0.02) & (moved[inside] <= wanted.max(0) + 0.02)
    assert within.all(axis=1).mean() > 0.8
    assert np.abs(moved[inside].mean(0) - wanted.mean(0)).max() < 0.1


def test_a_picture_is_sure_of_itself(client: ComfyClient, graph: dict[str, Any]) -> None:
    match = matched(appearance=["a", 0], appearance_mask=["a", 1], temperature=0.001, balance=0.0, top_k=1)
    ready = {**graph, "match": match, "sure": node("MaskToImage", mask=["match", 2])}
    rendered = world.render(world.demo_pair()[0])
    # Away from the outline, where tokens that were not matched begin.
    inside = np.asarray(Image.fromarray(rendered.mask > 0.99).convert("L").filter(ImageFilter.MinFilter(33))) > 0
    assert images(client, ready, "sure")[inside].min() > 0.99
    moved = images(client, ready, "match", 1)
    assert np.abs(moved - rendered.image)[inside].mean() < 0.03


def test_the_correspondence_sheet_has_two_rows_of_three(client: ComfyClient, graph: dict[str, Any]) -> None:
    sheet = images(client, {**graph, "match": matched()}, "match")
    assert sheet.shape == (10 + 2 * (24 + 320 + 10), 10 + 3 * (320 + 10), 3)


def scored(client: ComfyClient, graph: dict[str, Any], **inputs: Any) -> dict[str, float | None]:
    values: dict[str, Any] = {"result": ["a", 0], "shape": ["a", 0], "appearance": ["b", 0], "block": -1, "size": 0}
    score = node("ShapeAppearanceCompositionScore", **{"features": ["load", 0], **values, **inputs})
    (text,) = client.run({**graph, "score": score})["score"]["text"]
    title, *lines = text.splitlines()
    assert title == "demo-vit, block 5, 128 px"
    found = {}
    for line in lines:
        name, value = line.split(": ", 1)
        number = value.split(" ", 1)[0]
        found[name] = None if number == "-" else float(number)
    return found


def test_scores_of_known_results(client: ComfyClient, graph: dict[str, Any]) -> None:
    masks = {"result_mask": ["a", 1], "shape_mask": ["a", 1], "appearance_mask": ["b", 1]}
    own = scored(client, graph, **masks)
    assert own["self-similarity distance"] == 0
    assert own["mask overlap (IoU)"] == 1
    assert own["colour difference"] is not None and own["colour difference"] > 20
    other = scored(client, graph, result=["b", 0])
    assert other["CLS similarity"] == 1
    assert other["mask overlap (IoU)"] is None
    assert other["colour difference"] == 0
    assert other["self-similarity distance"] is not None and other["self-similarity distance"] > 0


def test_the_score_table_is_a_picture(client: ComfyClient, graph: dict[str, Any]) -> None:
    values: dict[str, Any] = {"result": ["a", 0], "shape": ["a", 0], "appearance": ["b", 0], "block": -1, "size": 0}
    score = node("ShapeAppearanceCompositionScore", features=["load", 0], **values)
    drawn = images(client, {**graph, "score": score}, "score", 1)
    assert drawn.std() > 0.05


@pytest.mark.parametrize(
    ("backbone", "hint"),
    [("dino-vitb8", "no automatic download"), ("dinov3-vits16", "turn on 'download'.*DINOv3 License")],
)
def test_a_missing_file_is_named_with_its_place(
    client: ComfyClient, graph: dict[str, Any], backbone: str, hint: str
) -> None:
    graph["load"]["inputs"]["backbone"] = backbone
    with pytest.raises(ExecutionFailed, match=rf"feature_extractors.vit_\w+\.\w+\.safetensors: fetch.*{hint}"):
        client.run({**graph, "see": seen()})


def test_two_pictures_are_not_matched_with_one(client: ComfyClient, graph: dict[str, Any]) -> None:
    batch = node("ImageBatch", image1=["a", 0], image2=["b", 0])
    with pytest.raises(ExecutionFailed, match="the appearance is a batch of 2 pictures"):
        client.run({**graph, "batch": batch, "match": matched(appearance=["batch", 0], appearance_mask=["b", 1])})
