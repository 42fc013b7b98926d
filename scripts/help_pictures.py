"""Makes the pictures of the help pages, before and after, with the demo model in a real ComfyUI.

    .venv/bin/python scripts/help_pictures.py                  # all of them
    .venv/bin/python scripts/help_pictures.py KVInjection ...  # those of these nodes

A page shows `web/docs/<node id>/picture.webp`. Which nodes have none, `WITHOUT` says with the reason.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo import compose
from demo.client import ComfyClient
from demo.server import ComfyServer, free_port
from demo.sheet import contact_sheet

PREFIX = "ShapeAppearance"
DOCS = ROOT / "web" / "docs"
WIDTH = 800
"""Of a picture, in pixels: a help page is narrow, and the pack is downloaded with all of them."""
MAX_BYTES = 40 * 1024
STEPS, TRAINING_STEPS = 20, 150
WITHOUT = {
    "SaveInversion": "writes a file",
    "SaveReferenceCache": "writes a file",
    "LoadReferenceCache": "changes the time alone",
}

Graph = dict[str, dict[str, Any]]
Panels = dict[str, Image.Image]
Drawing = Callable[["Studio"], Panels]


class Studio:
    """The demo's pair of pictures on a running server, and the parts that most graphs have in common."""

    def __init__(self, client: ComfyClient) -> None:
        self._client = client
        job = compose.plan(compose.parse([]))
        self.prompt = job.prompt
        self.shape, self.appearance = job.shape.convert("RGB"), job.appearance.convert("RGB")
        self._names = [client.upload_image(job.shape, "shape.png"), client.upload_image(job.appearance, "look.png")]

    def run(self, graph: Graph) -> dict[str, Image.Image]:
        """What each Save Image of the graph saves; its id is the panel's name."""
        saves = [name for name, node in graph.items() if node["class_type"] == "SaveImage"]
        outputs = self._client.run(graph)
        return {name: self._client.fetch_images(outputs, name)[0] for name in saves}

    def base(self) -> Graph:
        """The model, both pictures and both references, and the texts."""
        return {
            "demo": own("LoadDemoModel"),
            "shape_file": node("LoadImage", image=self._names[0]),
            "look_file": node("LoadImage", image=self._names[1]),
            "shape": self.encoded("shape_file", flatten=1.0),
            "look": self.encoded("look_file"),
            "positive": node("CLIPTextEncode", text=self.prompt, clip=["demo", 1]),
            "negative": node("CLIPTextEncode", text="", clip=["demo", 1]),
            "size": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        }

    @staticmethod
    def encoded(file: str, flatten: float = 0.0) -> dict[str, Any]:
        fixed = {"noise_seed": 0, "strength": 1.0, "flatten": flatten}
        return own("EncodeReference", image=[file, 0], mask=[file, 1], vae=["demo", 2], **fixed)


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def own(kind: str, **inputs: Any) -> dict[str, Any]:
    return node(PREFIX + kind, **inputs)


def injected(**inputs: Any) -> dict[str, Any]:
    links = {"model": ["demo", 0], "appearance": ["look", 0], "shape": ["shape", 0]}
    return own(
        "KVInjection", **{**links, "preset": "default", "strength": 1.0, "shape_strength": 1.0, "color": 1.0} | inputs
    )


def sampled(graph: Graph, name: str, model: list, positive: list | None = None) -> Graph:
    """The graph and a sampling with this MODEL, saved under a name."""
    numbers = {"seed": 0, "steps": STEPS, "cfg": 3.0, "denoise": 1.0}
    links = {"positive": positive or ["positive", 0], "negative": ["negative", 0], "latent_image": ["size", 0]}
    names = {"sampler_name": "euler", "scheduler": "normal"}
    return {
        **graph,
        f"{name}/sampler": node("KSampler", model=model, **links, **numbers, **names),
        f"{name}/decode": node("VAEDecode", samples=[f"{name}/sampler", 0], vae=["demo", 2]),
        name: node("SaveImage", images=[f"{name}/decode", 0], filename_prefix="help"),
    }


def saved(graph: Graph, name: str, images: list) -> Graph:
    return {**graph, name: node("SaveImage", images=images, filename_prefix="help")}


def load_demo_model(studio: Studio) -> Panels:
    graph = studio.base()
    texts = ("a red striped star on sky", "a blue dotted circle on sand", "a green plain square on night")
    for text in texts:
        graph[f"text {text}"] = node("CLIPTextEncode", text=text, clip=["demo", 1])
        graph = sampled(graph, text, ["demo", 0], [f"text {text}", 0])
    return studio.run(graph)


def encode_reference(studio: Studio) -> Panels:
    """The pair the other way round: here the shape is the one with a texture."""
    graph = {**studio.base(), "plain": studio.encoded("shape_file")}
    for name, flatten in (("flatten 0", 0.0), ("flatten 1", 1.0)):
        graph[f"{name}/shape"] = studio.encoded("look_file", flatten)
        graph[f"{name}/kv"] = injected(shape=[f"{name}/shape", 0], appearance=["plain", 0])
        graph = sampled(graph, name, [f"{name}/kv", 0])
    return {"shape": studio.appearance, "appearance": studio.shape, **studio.run(graph)}


def invert_reference(studio: Studio) -> Panels:
    graph = studio.base()
    for policy in ("ddim", "edit-friendly"):
        links = {"model": ["demo", 0], "reference": ["look", 0], "conditioning": ["negative", 0]}
        graph[policy] = own("InvertReference", **links, policy=policy, steps=STEPS, noise_seed=0)
        custom = {"add_noise": False, "noise_seed": 0, "cfg": 1.0}
        texts = {"positive": ["negative", 0], "negative": ["negative", 0]}
        found = {"latent_image": [policy, 1], "sampler": [policy, 2], "sigmas": [policy, 3]}
        graph[f"{policy}/drawn"] = node("SamplerCustom", model=["demo", 0], **custom, **texts, **found)
        graph[f"{policy}/decode"] = node("VAEDecode", samples=[f"{policy}/drawn", 0], vae=["demo", 2])
        graph = saved(graph, f"drawn again, {policy}", [f"{policy}/decode", 0])
    return {"reference": studio.appearance, **studio.run(graph)}


def kv_injection(studio: Studio) -> Panels:
    graph = {**studio.base(), "kv": injected()}
    graph = sampled(sampled(graph, "without", ["demo", 0]), "with", ["kv", 0])
    return {"shape": studio.shape, "appearance": studio.appearance, **studio.run(graph)}


def custom_preset(studio: Studio) -> Panels:
    graph = studio.base()
    numbers = {"start_percent": 0.0, "end_percent": 1.0, "shape_end_percent": 1.0, "shape_query": 1.0}
    more = {"shape_features": 1.0, "contrast": 1.0, "temperature": 1.0, "reference_bias": 0.0}
    rest = {"shape_sites": "", "match_statistics": False, "rows": "all"}
    for name, reference, sites in (
        ("replace, all", "replace", "all"),
        ("replace, decoder.fine", "replace", "decoder.fine"),
        ("extend, all", "extend", "all"),
    ):
        graph[f"{name}/preset"] = own("CustomPreset", reference=reference, sites=sites, **numbers, **more, **rest)
        graph[f"{name}/kv"] = injected(custom=[f"{name}/preset", 0])
        graph = sampled(graph, name, [f"{name}/kv", 0])
    return studio.run(graph)


def injection_report(studio: Studio) -> Panels:
    graph = sampled({**studio.base(), "kv": injected()}, "result", ["kv", 0])
    graph["report"] = own("InjectionReport", model=["kv", 0], latent=["result/sampler", 0])
    return {"appearance": studio.appearance, **studio.run(saved(graph, "reading", ["report", 2]))}


def color_match(studio: Studio) -> Panels:
    links = {"image": ["shape_file", 0], "mask": ["shape_file", 1]}
    links |= {"reference": ["look_file", 0], "reference_mask": ["look_file", 1]}
    choices = {"method": "mkl", "space": "CIELAB", "strength": 1.0, "keep_luminance": False}
    choices |= {"feather": 0, "frames": "per image", "frame": 0}
    graph = {**studio.base(), "match": own("AdaINColorMatch", **links, **choices)}
    panels = {"before": studio.shape, "reference": studio.appearance}
    return {**panels, **studio.run(saved(graph, "after", ["match", 0]))}


def color_guidance(studio: Studio) -> Panels:
    graph = studio.base()
    graph["positive"]["inputs"]["text"] = "a striped star on sky"
    choices = {"method": "adain", "strength": 1.0, "start_percent": 0.2, "end_percent": 0.95, "ramp": "constant"}
    graph["guided"] = own("AdaINColorGuidance", model=["demo", 0], reference=["look", 0], **choices)
    graph = sampled(sampled(graph, "without", ["demo", 0]), "with", ["guided", 0])
    return {"reference": studio.appearance, **studio.run(graph)}


def learned(studio: Studio, kind: str, text: str) -> Graph:
    """A training from one of the pictures, and a model and texts that know the word."""
    file = "shape_file" if kind == "Shape" else "look_file"
    links = {"model": ["demo", 0], "clip": ["demo", 1], "vae": ["demo", 2], "images": [file, 0], "mask": [file, 1]}
    choices: dict[str, Any] = {"token": "mine", "class_word": "shape", "quality": "balanced", "seed": 0, "size": 512}
    if kind == "Appearance":
        choices |= {"class_word": "striped", "objective": "attention"}
    graph = studio.base()
    graph["learn"] = own(f"{kind}Inversion", **links, **choices, steps=TRAINING_STEPS)
    for name, strength in (("without", 0.0), ("with", 1.0)):
        both = {"token_strength": strength, "offset_strength": strength}
        given = {"model": ["demo", 0], "clip": ["demo", 1], "inversion": ["learn", 0]}
        graph[f"{name}/apply"] = own("ApplyInversion", **given, **both)
        graph[f"{name}/text"] = node("CLIPTextEncode", text=text, clip=[f"{name}/apply", 1])
        graph = sampled(graph, name, [f"{name}/apply", 0], [f"{name}/text", 0])
    return graph


def shape_inversion(studio: Studio) -> Panels:
    panels = studio.run(saved(learned(studio, "Shape", "a red <mine> on sky"), "loss", ["learn", 1]))
    return {"learned from": studio.shape, **{name: panels[name] for name in ("loss", "without", "with")}}


def appearance_inversion(studio: Studio) -> Panels:
    panels = studio.run(saved(learned(studio, "Appearance", "a <mine> star on sky"), "loss", ["learn", 1]))
    return {
        "learned from": studio.appearance,
        "loss": panels["loss"],
        "without": panels["without"],
        "with": panels["with"],
    }


def apply_inversion(studio: Studio) -> Panels:
    panels = studio.run(learned(studio, "Shape", "a blue dotted <mine> on sand"))
    return {"learned from": studio.shape, "both strengths 0": panels["without"], "both strengths 1": panels["with"]}


def features(studio: Studio, kind: str, **inputs: Any) -> Graph:
    extractor = own("LoadFeatureExtractor", backbone="demo-vit", precision="float32", download=False)
    return {**studio.base(), "features": extractor, "node": own(kind, features=["features", 0], **inputs)}


def preview_features(studio: Studio) -> Panels:
    graph = features(studio, "PreviewFeatures", image=["shape_file", 0], x=0.5, y=0.5, block=-1, size=0)
    return studio.run(saved(graph, "", ["node", 0]))


def preview_correspondence(studio: Studio) -> Panels:
    links = {"shape": ["shape_file", 0], "shape_mask": ["shape_file", 1]}
    links |= {"appearance": ["look_file", 0], "appearance_mask": ["look_file", 1]}
    choices = {"temperature": 0.05, "top_k": 4, "balance": 0.0, "compare": "tokens", "block": -1, "size": 0}
    graph = features(studio, "PreviewCorrespondence", **links, **choices)
    return studio.run(saved(graph, "", ["node", 0]))


def cross_feature(studio: Studio) -> Panels:
    links = {"model": ["demo", 0], "appearance": ["look", 0], "shape": ["shape", 0]}
    numbers = {
        "strength": 1.0,
        "share": 1.0,
        "start_percent": 0.0,
        "end_percent": 0.5,
        "shape_strength": 1.0,
        "color": 1.0,
    }
    choices = {"rest": "queries", "sites": "all", "temperature": 0.05, "top_k": 4, "balance": 0.0, "compare": "tokens"}
    graph = features(studio, "CrossFeatureAttention", **links, **numbers, **choices, block=-1, size=0, refresh=0)
    graph = sampled(sampled(graph, "without", ["demo", 0]), "with", ["node", 0])
    return {"shape": studio.shape, "appearance": studio.appearance, **studio.run(graph)}


def self_similarity(studio: Studio) -> Panels:
    links = {"model": ["demo", 0], "shape": ["shape_file", 0], "vae": ["demo", 2]}
    numbers = {"strength": 1.0, "start_percent": 0.0, "end_percent": 0.8, "repeats": 1, "appearance_weight": 0.0}
    graph = features(studio, "SelfSimilarityGuidance", **links, **numbers, block=-1, size=0)
    graph["positive"]["inputs"]["text"] = "a red dotted shape on sky"
    graph = sampled(sampled(graph, "without", ["demo", 0]), "with", ["node", 0])
    return {"shape": studio.shape, **studio.run(graph)}


def composition_score(studio: Studio) -> Panels:
    graph = sampled({**studio.base(), "kv": injected()}, "result", ["kv", 0])
    links = {"result": ["result/decode", 0], "shape": ["shape_file", 0], "appearance": ["look_file", 0]}
    score = features(studio, "CompositionScore", **links, block=-1, size=0)
    return {"": studio.run(saved({**graph, **score}, "", ["node", 1]))[""]}


def demo_picture(studio: Studio) -> Panels:
    """By the words chosen: shape, colour, texture, background."""
    graph: Graph = {}
    for seed, words in enumerate((("heart", "purple", "plain", "sky"), ("fish", "green", "dotted", "snow")), 1):
        chosen = dict(zip(("shape", "color", "texture", "background"), words, strict=True))
        graph[f"picture {seed}"] = own("DemoPicture", **chosen, seed=seed, size=128)
        graph = saved(graph, ", ".join(words), [f"picture {seed}", 0])
    graph["as picture"] = node("MaskToImage", mask=["picture 2", 1])
    return studio.run(saved(graph, "its mask", ["as picture", 0]))


DRAWINGS: dict[str, Drawing] = {
    "LoadDemoModel": load_demo_model,
    "DemoPicture": demo_picture,
    "EncodeReference": encode_reference,
    "InvertReference": invert_reference,
    "KVInjection": kv_injection,
    "CustomPreset": custom_preset,
    "InjectionReport": injection_report,
    "AdaINColorMatch": color_match,
    "AdaINColorGuidance": color_guidance,
    "ShapeInversion": shape_inversion,
    "AppearanceInversion": appearance_inversion,
    "ApplyInversion": apply_inversion,
    "LoadInversion": apply_inversion,
    "LoadFeatureExtractor": preview_features,
    "PreviewFeatures": preview_features,
    "CrossFeatureAttention": cross_feature,
    "SelfSimilarityGuidance": self_similarity,
    "PreviewCorrespondence": preview_correspondence,
    "CompositionScore": composition_score,
}


def write(kind: str, panels: Panels) -> Path:
    """A single panel without a name is a sheet of the node's own; others are put side by side under their names."""
    picture = panels[""] if list(panels) == [""] else contact_sheet(panels)
    picture = picture.convert("RGB")
    width = min(WIDTH, picture.width)
    picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    path = DOCS / f"{PREFIX}{kind}" / "picture.webp"
    for quality in (90, 80, 70, 60, 50, 40):
        picture.save(path, quality=quality, method=6)
        if path.stat().st_size <= MAX_BYTES:
            return path
    raise ValueError(f"{path} has {path.stat().st_size} bytes at quality 40: at most {MAX_BYTES} are wanted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nodes", nargs="*", choices=[[], *DRAWINGS], help="which (default: all)")
    chosen = parser.parse_args().nodes or list(DRAWINGS)
    with ComfyServer(free_port()) as server, ComfyClient(server.url) as client:
        studio = Studio(client)
        drawn: dict[Drawing, Panels] = {}
        for kind in chosen:
            draw = DRAWINGS[kind]
            drawn[draw] = drawn.get(draw) or draw(studio)
            path = write(kind, drawn[draw])
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1024:.0f} KiB", flush=True)


if __name__ == "__main__":
    main()
