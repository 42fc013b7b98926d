"""Extractors in ComfyUI's memory management, and ComfyUI's image encoders against its own `encode_image`."""

# ruff: noqa: E402
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from demo.comfy import ensure_importable

ensure_importable()

import comfy.clip_vision
import comfy.model_management

from demo.train.data import reset
from demo.vit import BACKBONE
from demo.weights import FOLDER
from inversion_core.features import Backbone, FeatureError, TimmExtractor, load, self_similarity
from inversion_core.hosts.comfy_vision import ClipVisionExtractor, managed_extractor

DEMO_VIT = Backbone(**BACKBONE)
WIDTH = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 3, "num_channels": 3}
CLIP = {
    "model_type": "clip_vision_model",
    "intermediate_size": 96,
    "patch_size": 8,
    "image_size": 32,
    "projection_dim": 24,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SIGLIP = {
    **CLIP,
    "model_type": "siglip_vision_model",
    "hidden_act": "gelu_pytorch_tanh",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
# ComfyUI's DINOv2 has its patch and its table of positions in the code: 14 pixels, 37 x 37.
DINO = {"model_type": "dinov2", "image_size": 518, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False}
KINDS = {"CLIP": CLIP, "SigLIP": SIGLIP, "DINOv2": DINO}


def clip_vision(kind: str, folder: Path) -> Any:
    """One of ComfyUI's ClipVisionModels, small, with random weights."""
    path = folder / "config.json"
    path.write_text(json.dumps({**WIDTH, **KINDS[kind]}), encoding="utf-8")
    found = comfy.clip_vision.ClipVisionModel(str(path))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in found.model.parameters():
            weight.normal_(std=0.2)
    return found


def pictures(height: int, width: int, count: int = 1) -> Tensor:
    """IMAGE in 8 bits, which is what ComfyUI rounds to."""
    values = torch.randint(0, 256, (count, height, width, 3), generator=torch.Generator().manual_seed(0))
    return values.float() / 255


def extracted(extractor: Any, image: Tensor, **options: Any) -> Any:
    return extractor(image.movedim(-1, 1), **options)


@pytest.fixture(params=list(KINDS))
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return clip_vision(request.param, tmp_path)


def test_at_its_own_size_it_is_comfyuis_encoding(encoder: Any) -> None:
    extractor = ClipVisionExtractor(encoder)
    side = encoder.image_size
    image = pictures(side, side, 2)
    theirs = encoder.encode_image(image)
    last = extracted(extractor, image)
    penultimate = extracted(extractor, image, block=-2)
    prefix = extractor.prefix
    assert last.grid == (side // extractor.patch,) * 2
    if encoder.return_all_hidden_states:  # SigLIP, whose last state has been through the last LayerNorm
        assert last.cls is None and prefix == 0
        assert_close(last.normed, theirs.last_hidden_state)
        assert_close(penultimate.tokens, theirs.penultimate_hidden_states)
    elif extractor.patch == 14:
        assert_close(last.normed, theirs.last_hidden_state[:, 1:])
        assert_close(last.cls_normed, theirs.image_embeds)
        assert_close(penultimate.tokens, theirs.penultimate_hidden_states[:, 1:])
    else:
        assert_close(last.tokens, theirs.last_hidden_state[:, 1:])
        assert_close(encoder.model.visual_projection(last.cls_normed), theirs.image_embeds)
        assert_close(penultimate.tokens, theirs.penultimate_hidden_states[:, 1:])


def test_keys_are_those_of_the_block(encoder: Any) -> None:
    extractor = ClipVisionExtractor(encoder)
    side = encoder.image_size
    image = pictures(side, side)
    before, found = extracted(extractor, image, block=0), extracted(extractor, image, block=1)
    network = getattr(encoder.model, "vision_model", encoder.model)
    if extractor.patch == 14:
        block = network.encoder.layer[1]
        expected = block.attention.attention.key(block.norm1(before.tokens))
    else:
        block = network.encoder.layers[1]
        expected = block.self_attn.k_proj(block.layer_norm1(before.tokens))
    assert found.keys.shape == (1, 3, before.tokens.shape[1], 16)
    assert_close(found.descriptors("keys"), expected)


def test_other_shapes_keep_their_aspect(encoder: Any) -> None:
    extractor = ClipVisionExtractor(encoder)
    patch = extractor.patch
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    found = extracted(extractor, pictures(60, 119), size=5 * patch)
    assert found.grid == (4, 7)
    assert found.tokens.shape[1] == 28
    assert bool(found.tokens.isfinite().all())
    assert_close(dict(encoder.model.state_dict()), before, rtol=0, atol=0)


def test_no_gradients_from_clip_vision(encoder: Any) -> None:
    extractor = ClipVisionExtractor(encoder)
    with torch.inference_mode(False):
        image = torch.rand(1, 3, 32, 32).requires_grad_()
    with pytest.raises(FeatureError, match="no gradients: disconnect it"):
        extractor(image, grad=True)


def test_another_encoder_is_refused() -> None:
    class Other:
        model = torch.nn.Linear(2, 2)

    with pytest.raises(FeatureError, match="is a Linear, but CLIP, SigLIP and DINOv2"):
        ClipVisionExtractor(Other())


def test_two_encoders_of_one_kind_are_told_apart(tmp_path: Path) -> None:
    first, second = clip_vision("CLIP", tmp_path), clip_vision("CLIP", tmp_path)
    reset(second.model)
    image = pictures(32, 32)
    same, other = (extracted(ClipVisionExtractor(one), image).content for one in (first, second))
    assert extracted(ClipVisionExtractor(first), image).content == same
    assert other != same


def test_comfyui_loads_the_vit_when_it_is_used_and_can_unload_it() -> None:
    extractor = managed_extractor(DEMO_VIT, FOLDER / DEMO_VIT.file)
    plain = TimmExtractor(load(DEMO_VIT, FOLDER / DEMO_VIT.file), DEMO_VIT)

    def loaded() -> bool:
        return any(extractor.model is one.model.model for one in comfy.model_management.current_loaded_models)

    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    assert not loaded()
    assert_close(extractor(image).keys, plain(image).keys)
    assert loaded()
    comfy.model_management.unload_all_models()
    assert not loaded()
    extractor(image)
    assert not loaded()  # remembered
    assert_close(extractor(image, block=2).keys, plain(image, block=2).keys)
    assert loaded()


def test_a_gradient_inside_a_node() -> None:
    extractor = managed_extractor(DEMO_VIT, FOLDER / DEMO_VIT.file)
    with torch.inference_mode(False), torch.enable_grad():
        image = torch.rand(1, 3, 64, 64).requires_grad_()
        target = self_similarity(extractor(torch.rand(1, 3, 64, 64)))
        (self_similarity(extractor(image, grad=True)) - target).square().mean().backward()
    assert image.grad is not None
    assert float(image.grad.abs().max()) > 0
