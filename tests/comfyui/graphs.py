"""Small workflows with the pack's nodes and core's; node ids say what a node is for."""

from typing import Any

import numpy as np
from PIL import Image

from demo import world
from demo.client import ComfyClient, Prompt

Node = dict[str, Any]
PROMPT = "a red striped star on sky"


def node(class_type: str, **inputs: Any) -> Node:
    return {"class_type": class_type, "inputs": inputs}


def text_to_image(
    text: str = PROMPT, *, steps: int = 4, width: int = 128, height: int = 128, **loader: str
) -> dict[str, Node]:
    """The stock text-to-image workflow on the demo model; `loader` are the loader's own inputs."""
    return {
        "demo": node("ShapeAppearanceLoadDemoModel", **loader),
        "positive": node("CLIPTextEncode", text=text, clip=["demo", 1]),
        "negative": node("CLIPTextEncode", text="", clip=["demo", 1]),
        "size": node("EmptyLatentImage", width=width, height=height, batch_size=1),
        "sampler": node(
            "KSampler",
            model=["demo", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["size", 0],
            seed=1,
            steps=steps,
            cfg=3.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["demo", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="test"),
    }


def encoded(picture: str, **inputs: Any) -> Node:
    """Encode Reference on the picture of this node, with the demo model's VAE."""
    values = {"noise_seed": 0, "strength": 1.0, "flatten": 0.0}
    return node("ShapeAppearanceEncodeReference", **{"image": [picture, 0], "vae": ["demo", 2], **values, **inputs})


def injected(reference: str, **inputs: Any) -> dict[str, Node]:
    """Two steps with KV Injection; `inputs` are its own. `reference` is the name of an uploaded picture."""
    graph = text_to_image(steps=2)
    graph["picture"] = node("LoadImage", image=reference)
    graph["encode"] = encoded("picture")
    values = {"preset": "default", "strength": 1.0, "shape_strength": 1.0, "color": 1.0}
    graph["inject"] = node(
        "ShapeAppearanceKVInjection", **{"model": ["demo", 0], "appearance": ["encode", 0], **values, **inputs}
    )
    graph["sampler"]["inputs"]["model"] = ["inject", 0]
    return graph


def custom(reference: str, **inputs: Any) -> dict[str, Node]:
    """As `injected`, by a Custom Preset with these inputs."""
    graph = injected(reference)
    values = {
        "reference": "replace",
        "sites": "all",
        "start_percent": 0.0,
        "end_percent": 1.0,
        "shape_sites": "",
        "shape_end_percent": 0.8,
        "shape_query": 1.0,
        "shape_features": 1.0,
        "contrast": 1.0,
        "temperature": 1.0,
        "reference_bias": 0.0,
        "match_statistics": False,
        "rows": "all",
    }
    graph["custom"] = node("ShapeAppearanceCustomPreset", **{**values, **inputs})
    graph["inject"]["inputs"]["custom"] = ["custom", 0]
    return graph


def pictures(client: ComfyClient, graph: Prompt) -> np.ndarray:
    """What the graph's "save" saves: (B, H, W, 3) bytes."""
    return np.stack([np.asarray(image.convert("RGB")) for image in client.fetch_images(client.run(graph), "save")])


def rendered(seed: int) -> Image.Image:
    return Image.fromarray(np.uint8(np.round(world.render(world.sample(seed)).image * 255)))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference, in grey levels of 255."""
    return float(np.abs(a.astype(float) - b.astype(float)).mean())
