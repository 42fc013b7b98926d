"""The demo model is a model like any other to ComfyUI's own nodes. Needs the trained weights in demo/safetensors."""

import asyncio
import json
from io import BytesIO
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from demo.client import ComfyClient
from demo.server import ComfyServer

from .graphs import Node, difference, node, pictures, rendered, text_to_image

VISIBLE = 0.5
"""Grey levels of 255 on the mean: what counts as another picture."""
ROUNDING = 0.25


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean(((a.astype(float) - b.astype(float)) / 255) ** 2)))


def write_tensors(server: ComfyServer, kind: str, name: str, tensors: dict[str, torch.Tensor]) -> str:
    folder = server.base / "models" / kind
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)
    return name


NETWORKS = ("UNet", "DiT")
LORA_TARGETS = {
    "UNet": {
        "output_blocks.3.1.transformer_blocks.0.attn1.to_v": (64, 64),
        "output_blocks.1.1.transformer_blocks.0.attn1.to_v": (128, 128),
    },
    "DiT": {"joint_blocks.1.x_block.attn.qkv": (128, 384), "joint_blocks.3.x_block.attn.proj": (128, 128)},
}
"""Attention's layers, with their numbers of inputs and outputs."""


def lora(server: ComfyServer, network: str) -> str:
    """Rank 2, on two layers of attention."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer, (inputs, outputs) in LORA_TARGETS[network].items():
        name = f"diffusion_model.{layer}"
        tensors[f"{name}.lora_up.weight"] = torch.randn(outputs, 2, generator=generator)
        tensors[f"{name}.lora_down.weight"] = 0.3 * torch.randn(2, inputs, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return write_tensors(server, "loras", f"test_lora_{network}.safetensors", tensors)


def with_lora(name: str, strength: float, network: str) -> dict[str, Node]:
    graph = text_to_image(network=network)
    graph["lora"] = node(
        "LoraLoader", model=["demo", 0], clip=["demo", 1], lora_name=name, strength_model=strength, strength_clip=1.0
    )
    graph["sampler"]["inputs"]["model"] = ["lora", 0]
    graph["positive"]["inputs"]["clip"] = ["lora", 1]
    return graph


@pytest.mark.parametrize("network", NETWORKS)
def test_the_prompt_matters_and_so_do_its_weights(client: ComfyClient, network: str) -> None:
    plain = pictures(client, text_to_image("a red striped star on sky", network=network))
    assert difference(plain, pictures(client, text_to_image("a blue dotted moon on night", network=network))) > 10
    assert difference(plain, pictures(client, text_to_image("a (red:1.2) striped star on sky", network=network))) > 0.05
    assert difference(plain, pictures(client, text_to_image("a (red:1.0) striped star on sky", network=network))) == 0


def test_a_workflow_that_names_no_network_gets_the_unet(client: ComfyClient) -> None:
    unnamed = pictures(client, text_to_image(steps=2))
    unet, dit = (pictures(client, text_to_image(steps=2, network=network)) for network in NETWORKS)
    assert difference(unnamed, unet) == 0
    assert difference(unnamed, dit) > VISIBLE


@pytest.mark.parametrize("network", NETWORKS)
def test_empty_latents_give_their_own_size(client: ComfyClient, network: str) -> None:
    graph = text_to_image(steps=2, width=192, height=64, network=network)
    assert pictures(client, graph).shape == (1, 64, 192, 3)


def test_the_vae_keeps_a_picture_whole_and_in_tiles(client: ComfyClient) -> None:
    picture = rendered(5).resize((256, 256), Image.Resampling.LANCZOS)
    tiles = {"tile_size": 128, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
    for encode in (
        node("VAEEncode", pixels=["picture", 0], vae=["demo", 2]),
        node("VAEEncodeTiled", pixels=["picture", 0], vae=["demo", 2], **tiles),
    ):
        for decode in (
            node("VAEDecode", samples=["encode", 0], vae=["demo", 2]),
            node("VAEDecodeTiled", samples=["encode", 0], vae=["demo", 2], **tiles),
        ):
            graph = {
                "demo": node("ShapeAppearanceLoadDemoModel"),
                "picture": node("LoadImage", image=client.upload_image(picture, "vae.png")),
                "encode": encode,
                "decode": decode,
                "save": node("SaveImage", images=["decode", 0], filename_prefix="vae"),
            }
            (result,) = pictures(client, graph)
            assert result.shape == (256, 256, 3)
            assert psnr(result, np.asarray(picture)) > 25


@pytest.mark.parametrize("network", NETWORKS)
def test_a_lora_changes_the_picture(client: ComfyClient, server: ComfyServer, network: str) -> None:
    name = lora(server, network)
    plain = pictures(client, text_to_image(network=network))
    assert difference(pictures(client, with_lora(name, 1.0, network)), plain) > VISIBLE
    assert difference(pictures(client, with_lora(name, 0.0, network)), plain) == 0
    assert "lora key not loaded" not in server.log_text()


def test_an_embedding_is_a_word(client: ComfyClient, server: ComfyServer) -> None:
    generator = torch.Generator().manual_seed(0)
    write_tensors(
        server, "embeddings", "test_style.safetensors", {"clip_l": 0.3 * torch.randn(2, 128, generator=generator)}
    )
    with_it = pictures(client, text_to_image("a embedding:test_style star on sky"))
    without = pictures(client, text_to_image("a star on sky"))

    assert difference(with_it, without) > VISIBLE
    assert "test_style does not exist" not in server.log_text()
    assert "WARNING: shape mismatch" not in server.log_text()


@pytest.mark.parametrize("network", NETWORKS)
def test_models_merge(client: ComfyClient, server: ComfyServer, network: str) -> None:
    name = lora(server, network)
    plain, changed = (
        pictures(client, graph) for graph in (text_to_image(network=network), with_lora(name, 1.0, network))
    )
    merged = {}
    for ratio in (0.0, 0.5, 1.0):
        graph = with_lora(name, 1.0, network)
        graph["merge"] = node("ModelMergeSimple", model1=["demo", 0], model2=["lora", 0], ratio=ratio)
        graph["sampler"]["inputs"]["model"] = ["merge", 0]
        merged[ratio] = pictures(client, graph)
    assert difference(merged[1.0], plain) < ROUNDING
    assert difference(merged[0.0], changed) < ROUNDING
    assert difference(merged[0.5], plain) > ROUNDING
    assert difference(merged[0.5], changed) > ROUNDING


@pytest.mark.parametrize("network", NETWORKS)
def test_previews_show_the_picture_as_it_forms(server: ComfyServer, client: ComfyClient, network: str) -> None:
    steps = 6
    graph = text_to_image(steps=steps, network=network)
    graph["sampler"]["inputs"]["seed"] = 77  # not cached
    previews, result = asyncio.run(run_with_previews(server.url, graph))

    assert len(previews) == steps
    (final,) = pictures(client, graph)
    thumbnail = np.asarray(Image.fromarray(final).resize((16, 16), Image.Resampling.BOX)).astype(float)
    likeness = [
        np.corrcoef(np.asarray(one.convert("RGB").resize((16, 16), Image.Resampling.BOX)).ravel(), thumbnail.ravel())
        for one in previews
    ]
    assert likeness[-1][0, 1] > 0.9
    assert likeness[-1][0, 1] > likeness[0][0, 1]
    assert result


async def run_with_previews(url: str, graph: dict[str, Node]) -> tuple[list[Image.Image], bool]:
    """Queue a workflow and collect the pictures the websocket brings until it is done."""
    previews: list[Image.Image] = []
    limit = aiohttp.ClientTimeout(total=120)
    async with (
        aiohttp.ClientSession(timeout=limit) as session,
        session.ws_connect(f"{url}/ws", params={"clientId": "previews"}, max_msg_size=0) as socket,
    ):
        async with session.post(f"{url}/prompt", json={"prompt": graph, "client_id": "previews"}) as answer:
            prompt_id = (await answer.json())["prompt_id"]
        async for message in socket:
            if message.type == aiohttp.WSMsgType.BINARY:
                assert int.from_bytes(message.data[:4], "big") == 1  # PREVIEW_IMAGE; then the format; then the file
                previews.append(Image.open(BytesIO(message.data[8:])))
                continue
            event = json.loads(message.data)
            if event["data"].get("prompt_id") == prompt_id and event["type"].startswith("execution_"):
                if event["type"] == "execution_success":
                    return previews, True
                assert event["type"] in ("execution_start", "execution_cached"), event
    return previews, False


def test_the_weights_are_there_and_small() -> None:
    """They are part of the pack: their absence is a failure, not a reason to skip."""
    folder = Path(__file__).resolve().parents[2] / "demo" / "safetensors"
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert {"autoencoder", "denoiser", "dit", "text_encoder", "judge"} <= {name.partition(".")[0] for name in sizes}
    assert sum(sizes.values()) <= 25 * 2**20
