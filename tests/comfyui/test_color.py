"""AdaIN Color Match and AdaIN Color Guidance on the real server."""

from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage.color import rgb2lab

from demo import world
from demo.client import ComfyClient, ExecutionFailed, Progress
from demo.comfy import PACK
from demo.graph import Graph, load_graph, node_titled, with_inputs, with_picture

WORKFLOW = PACK / "workflows" / "api" / "color_match.json"


def picture(factors: world.Factors, *, masked: bool = True) -> Image.Image:
    """As LoadImage takes it: alpha 0 is the object."""
    rendered = world.render(factors)
    image = Image.fromarray(np.uint8(np.round(rendered.image * 255)))
    if masked:
        image.putalpha(Image.fromarray(np.uint8(np.round((1 - rendered.mask) * 255))))
    return image


@pytest.fixture
def graph(client: ComfyClient) -> Graph:
    """The workflow as shipped, on the demo's pair."""
    a, b = world.demo_pair()
    ready = load_graph(WORKFLOW)
    for title, factors in (("Image", a), ("Reference image", b)):
        ready = with_picture(ready, title, client.upload_image(picture(factors), f"{title}.png"))
    return ready


def result(client: ComfyClient, graph: Graph, title: str = "Result", seen: list[Progress] | None = None) -> np.ndarray:
    outputs = client.run(graph, None if seen is None else seen.append)
    (image,) = client.fetch_images(outputs, node_titled(graph, title))
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255


def test_the_workflow_matches_the_object_and_nothing_else(client: ComfyClient, graph: Graph) -> None:
    a, b = (world.render(one) for one in world.demo_pair())
    out = result(client, graph)
    outside = a.mask == 0
    np.testing.assert_array_equal(np.round(out[outside] * 255), np.round(a.image[outside] * 255))
    before, after, wanted = (
        np.average(rgb2lab(image), axis=(0, 1), weights=np.broadcast_to(mask[..., None], image.shape))
        for image, mask in ((a.image, a.mask), (out, a.mask), (b.image, b.mask))
    )
    # The flat object's mean colour comes four fifths of the way at least; clipping at the gamut keeps it from the rest.
    assert np.linalg.norm(before - wanted) > 20
    assert np.linalg.norm(after - wanted) <= 0.2 * np.linalg.norm(before - wanted)


def test_a_mask_of_another_size_is_stretched_to_the_picture(client: ComfyClient, graph: Graph) -> None:
    """Such as a shape picture's whose proportions are not the result's."""
    a, _ = (world.render(one) for one in world.demo_pair())
    left = Image.new("RGBA", (60, 30), (0, 0, 0, 255))
    left.paste((0, 0, 0, 0), (0, 0, 30, 30))
    key = node_titled(graph, "AdaIN Color Match")
    graph["90"] = {"class_type": "LoadImage", "inputs": {"image": client.upload_image(left, "left.png")}}
    graph[key]["inputs"]["mask"] = ["90", 1]

    changed = np.abs(result(client, graph) - a.image).max(axis=2) > 1 / 255

    middle = a.image.shape[1] // 2
    assert changed[:, : middle - 4].mean() > 0.9 and not changed[:, middle + 4 :].any()


def test_strength_0_returns_the_picture(client: ComfyClient, graph: Graph) -> None:
    a, _ = (world.render(one) for one in world.demo_pair())
    out = result(client, with_inputs(graph, "AdaIN Color Match", strength=0.0))
    np.testing.assert_array_equal(np.round(out * 255), np.round(a.image * 255))


def test_the_preview_shows_the_matched_palettes(client: ComfyClient, graph: Graph) -> None:
    sheet = result(client, graph, "Preview")
    third = sheet.shape[1] // 3
    bars = [sheet[-20, i * third + 12 : (i + 1) * third - 12].mean(0) for i in range(3)]
    before, after, reference = bars
    assert np.abs(after - reference).mean() < 0.3 * np.abs(before - reference).mean()


@pytest.mark.parametrize("frames", ["per image", "one for all", "from one frame"])
def test_a_batch_reports_its_progress_picture_by_picture(client: ComfyClient, graph: Graph, frames: str) -> None:
    graph["6"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["1", 0], "amount": 3}}
    graph = with_inputs(graph, "AdaIN Color Match", frames=frames)
    graph["3"]["inputs"]["image"] = ["6", 0]
    seen: list[Progress] = []
    outputs = client.run(graph, seen.append)
    images = client.fetch_images(outputs, node_titled(graph, "Result"))
    assert [p for p in seen if p.node_id == "3"][-1] == Progress("3", 3, 3)
    first, *others = (np.asarray(image) for image in images)
    assert len(others) == 2
    for other in others:
        np.testing.assert_array_equal(other, first)


@pytest.mark.parametrize(("title", "name"), [("Image", "the mask"), ("Reference image", "the reference mask")])
def test_a_picture_without_alpha_gives_an_empty_mask_which_is_refused(
    client: ComfyClient, graph: Graph, title: str, name: str
) -> None:
    plain = client.upload_image(picture(world.demo_pair()[0], masked=False), "plain.png")
    with pytest.raises(ExecutionFailed, match=rf"{name} \(64x64\) is empty: paint"):
        client.run(with_picture(graph, title, plain))


def guided(client: ComfyClient, **inputs: Any) -> Graph:
    """Two steps on the demo model; strange colours are no matter, only what the guidance does to them."""
    reference = client.upload_image(picture(world.demo_pair()[1]), "guide.png")
    values = {"method": "adain", "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "ramp": "constant"}

    def node(class_type: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": class_type, "inputs": inputs, "_meta": {"title": class_type}}

    return {
        "1": node("ShapeAppearanceLoadDemoModel"),
        "2": node("LoadImage", image=reference),
        "3": node(
            "ShapeAppearanceEncodeReference",
            image=["2", 0],
            mask=["2", 1],
            vae=["1", 2],
            noise_seed=0,
            strength=1.0,
            flatten=0.0,
        ),
        "4": node("ShapeAppearanceAdaINColorGuidance", model=["1", 0], reference=["3", 0], **{**values, **inputs}),
        "5": node("CLIPTextEncode", text="a red plain star on sky", clip=["1", 1]),
        "6": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "7": node(
            "KSampler",
            model=["4", 0],
            positive=["5", 0],
            negative=["5", 0],
            latent_image=["6", 0],
            seed=1,
            steps=2,
            cfg=1.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "8": node("VAEDecode", samples=["7", 0], vae=["1", 2]),
        "9": {**node("SaveImage", images=["8", 0], filename_prefix="guided"), "_meta": {"title": "Result"}},
    }


def test_guidance_brings_the_references_colours_and_strength_0_none(client: ComfyClient) -> None:
    plain, matched = result(client, guided(client, strength=0.0)), result(client, guided(client))
    b = world.render(world.demo_pair()[1])
    wanted = b.image[b.mask > 0.9].mean(0)
    assert np.abs(matched.mean((0, 1)) - wanted).max() < 0.5 * np.abs(plain.mean((0, 1)) - wanted).max()


def test_guidance_that_never_fires_says_so(client: ComfyClient) -> None:
    with pytest.raises(ExecutionFailed, match="AdaIN Color Guidance changed nothing"):
        client.run(guided(client, start_percent=0.9, end_percent=0.95))
