"""Learning on diffusers' pipelines: the same numbers as on ComfyUI's models, and nothing left behind."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inversion_core.hosts import comfy_learning, diffusers_learning
from inversion_core.hosts.base import HostError
from inversion_core.hosts.comfy_inversion import apply_inversion
from inversion_core.learning.inversion import Inversion, LowRankWeights
from inversion_core.learning.learn import learn
from inversion_core.learning.lesson import InversionLesson
from inversion_core.learning.material import Material, prepare
from inversion_core.learning.model import LearningError, LearningModel
from inversion_core.learning.plan import Plan
from inversion_core.learning.recipes import stages

from .diffusers_models import FAMILIES
from .models import random
from .text_models import whole_twins

LATENT = (2, 4, 16, 16)
SHAPE = Plan("shape", "x", "red star", stages("shape", 4, 2), vectors=2, rank=2, variants=4)
APPEARANCE = replace(SHAPE, kind="appearance", stages=stages("appearance", 20, 2))
PLANS = pytest.mark.parametrize("plan", [SHAPE, APPEARANCE], ids=["shape", "appearance"])
EVERY_FAMILY = pytest.mark.parametrize("name", list(FAMILIES))


@pytest.fixture(autouse=True)
def outside_of_inference_mode() -> Iterator[None]:
    """As in a script: a pipeline that was loaded in inference mode cannot be learned on."""
    with torch.inference_mode(False):
        yield


def material(plan: Plan) -> Material:
    """Without an autoencoder."""
    masks = torch.zeros(1, 128, 128)
    masks[:, 32:96, 32:96] = 1
    pictures = (0.3 * random(1, 128, 128, 3, seed=1).abs() + 0.6 * masks[..., None]).clamp(0, 1)
    return prepare(
        lambda picture: torch.nn.functional.avg_pool2d(picture.permute(0, 3, 1, 2), 8)[:, [0, 1, 2, 0]],
        pictures,
        masks,
        plan,
    )


def step(opened: LearningModel, plan: Plan, saving: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of the first step, with an offset that does something."""
    lesson = InversionLesson(opened, material(plan), plan)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for up, _ in lesson.offset.weights().values():
            up.normal_(std=0.05, generator=generator)
    assert not saving or lesson.save_memory()
    losses = lesson.losses(plan.stages[-1], 0, range(2))
    torch.stack([loss.sum() for loss in losses.values()]).sum().backward()
    gradients = {
        f"{group}.{name}": one.grad
        for group, module in lesson.groups.items()
        for name, one in module.named_parameters()
        if one.grad is not None
    }
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(value.abs().max()) > 0, name
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=1e-3 * float(value.abs().max()), msg=name)


def some_inversion(opened: LearningModel) -> Inversion:
    """A strong random one."""
    found = InversionLesson(opened, material(SHAPE), replace(SHAPE, name="old")).inversion({})
    offset = {
        name: LowRankWeights(0.3 * random(*up.shape, seed=i), 0.3 * random(*down.shape, seed=100 + i))
        for i, (name, (up, down)) in enumerate(found.offset.items())
    }
    return replace(found, offset=offset, token={key: value + 0.3 for key, value in found.token.items()})


@EVERY_FAMILY
@PLANS
def test_a_step_is_that_of_the_comfyui_host(name: str, plan: Plan) -> None:
    both, clip = whole_twins(name)
    with comfy_learning.learning_model(both.comfy, clip, LATENT) as opened:
        expected, family, attentions = step(opened, plan), opened.family, opened.attentions()
        kinds = {path: (one.kind, one.part, one.heads) for path, one in attentions.items()}
        prediction, words = opened.prediction, opened.words("red star")
    with diffusers_learning.learning_model(both.pipe) as opened:
        assert (opened.family, opened.prediction) == (family, prediction)
        assert {path: (one.kind, one.part, one.heads) for path, one in opened.attentions().items()} == kinds
        assert all(torch.equal(value, opened.words("red star")[key]) for key, value in words.items())
        found = step(opened, plan)
    close(found[0], expected[0])
    assert len(found[1]) > 10
    close(found[1], expected[1])


@EVERY_FAMILY
def test_a_frozen_inversion_acts_as_apply_inversion(name: str) -> None:
    both, clip = whole_twins(name)
    plan = replace(APPEARANCE, beside="<old>")
    with diffusers_learning.learning_model(both.pipe) as opened:
        inversion = some_inversion(opened)
        plain = step(opened, SHAPE)
    patched, placed = apply_inversion(both.comfy, clip, inversion)
    with comfy_learning.learning_model(patched, placed, LATENT) as opened:
        expected = step(opened, plan)
    with diffusers_learning.learning_model(both.pipe, [inversion]) as opened:
        found = step(opened, plan)
        other = step(opened, SHAPE)
    close(found[0], expected[0])
    close(found[1], expected[1])
    assert abs(float(other[0]["diffusion"].sum() - plain[0]["diffusion"].sum())) > 1e-3
    with pytest.raises(LearningError, match="was learned for SD9"), ExitStack() as stack:
        stack.enter_context(diffusers_learning.learning_model(both.pipe, [replace(inversion, family="SD9")]))


@EVERY_FAMILY
def test_learning_leaves_the_pipeline_as_it_was(name: str) -> None:
    both, _ = whole_twins(name)
    modules = [both.pipe.unet.train(), both.pipe.text_encoder, both.pipe.vae]
    before = [{key: value.clone() for key, value in module.state_dict().items()} for module in modules]
    fingerprint = diffusers_learning.fingerprint(both.pipe)
    with diffusers_learning.learning_model(both.pipe) as opened:
        assert not both.pipe.unet.training
        inversion, history = learn(opened, material(SHAPE), SHAPE, micro_batch=2)
    assert inversion.offset
    assert len(history.losses["diffusion"]) == 4
    assert both.pipe.unet.training and not both.pipe.text_encoder.training
    for module, values in zip(modules, before, strict=True):
        assert all(torch.equal(value, values[key]) for key, value in module.state_dict().items())
        assert all(one.requires_grad and one.grad is None for one in module.parameters())
        assert not [one for one in module.modules() if "forward" in vars(one)]
    # transformers leaves hooks of its own in a text encoder's layers.
    watched = [*both.pipe.unet.modules(), both.pipe.text_encoder.get_input_embeddings()]
    assert not [one for one in watched if one._forward_hooks or one._forward_pre_hooks]
    assert diffusers_learning.fingerprint(both.pipe) == fingerprint
    with torch.no_grad():
        both.pipe.vae.encoder.conv_in.weight.add_(0.1)
    assert diffusers_learning.fingerprint(both.pipe) != fingerprint


@EVERY_FAMILY
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    pipe = whole_twins(name)[0].pipe
    with diffusers_learning.learning_model(pipe) as opened:
        expected = step(opened, SHAPE)
        found = step(opened, SHAPE, saving=True)
    close(found[1], expected[1])


def test_pictures_are_encoded_as_a_pipeline_does() -> None:
    pipe = whole_twins("sdxl")[0].pipe
    pictures = random(1, 64, 64, 3, seed=1).abs().clamp(0, 1)
    with diffusers_learning.learning_model(pipe) as opened:
        found = opened.encode_pictures(pictures)
    given = pipe.image_processor.preprocess(pictures.permute(0, 3, 1, 2))
    with torch.no_grad():
        expected = pipe.vae.encode(given).latent_dist.mode() * pipe.vae.config.scaling_factor
    torch.testing.assert_close(found, expected)


def test_a_known_word_is_one_token() -> None:
    with diffusers_learning.learning_model(whole_twins("sd15")[0].pipe) as opened:
        assert opened.knows_word("star")
        assert not opened.knows_word("my-star")
        assert all(len(value) == 0 for value in opened.words("").values())


def test_prompts_that_cannot_be_encoded_are_refused() -> None:
    with diffusers_learning.learning_model(whole_twins("sd15")[0].pipe) as opened:
        with pytest.raises(HostError, match="82 tokens, but 77 fit"):
            opened.encode(["<x>"], {"x": {"clip_l": torch.zeros(80, 128)}})
        with pytest.raises(HostError, match="vectors of width 5 for clip_l, but this model's are 128"):
            opened.encode(["<x>"], {"x": {"clip_l": torch.zeros(1, 5)}})


def _without(pipe: Any, *names: str) -> Any:
    for name in names:
        setattr(pipe, name, None)
    return pipe


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda pipe: SimpleNamespace(unet=nn.Linear(1, 1)), "has a Linear where a UNet2DConditionModel is needed"),
        (lambda pipe: _without(pipe, "text_encoder", "tokenizer"), "no tokenizer, text_encoder.*refiner"),
        (lambda pipe: pipe.unet.register_to_config(class_embed_type="timestep") or pipe, "wants timestep"),
        (lambda pipe: pipe.scheduler.register_to_config(prediction_type="sample") or pipe, "predicts 'sample'"),
        (lambda pipe: pipe.unet.fuse_qkv_projections() or pipe, "unfuse_qkv_projections"),
    ],
)
def test_pipelines_that_cannot_be_learned_on_are_refused(spoil: Any, message: str) -> None:
    pipe = spoil(whole_twins("sd15")[0].pipe)
    with pytest.raises(HostError, match=message), diffusers_learning.learning_model(pipe):
        pass


def test_a_pipeline_of_inference_tensors_is_refused() -> None:
    with torch.inference_mode():
        pipe = whole_twins("sd15")[0].pipe
    with pytest.raises(HostError, match="load it outside of it"), diffusers_learning.learning_model(pipe):
        pass
