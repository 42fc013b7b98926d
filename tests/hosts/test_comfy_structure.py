"""Self-Similarity Guidance under ComfyUI's own sampler: the demo model, its autoencoder and its ViT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from demo import world
from demo.generate import encode_prompts
from demo.model import DemoModel, load_demo_model
from demo.vit import BACKBONE
from demo.weights import FOLDER
from inversion_core.features import Backbone, TimmExtractor, load
from inversion_core.hosts.base import HostError
from inversion_core.hosts.comfy_structure import StructureGuidance, attach, decode, last_losses
from inversion_core.injection import Window
from inversion_core.metrics import self_similarity_distance, self_similarity_loss

from .models import random, sample

NOISE = random(2, 4, 16, 16, seed=3)


@pytest.fixture(scope="module")
def demo() -> DemoModel:
    with torch.inference_mode():  # as ComfyUI loads it: its weights are inference tensors
        return load_demo_model()


@pytest.fixture(scope="module")
def see() -> TimmExtractor:
    backbone = Backbone(**BACKBONE)
    return TimmExtractor(load(backbone, FOLDER / backbone.file), backbone)


@pytest.fixture(scope="module")
def shape() -> Tensor:
    image = world.render(world.sample(50_000, shapes=("fish",))).image
    return torch.from_numpy(image)[None].movedim(-1, 1)


def drawn(demo: DemoModel, model: Any, noise: Tensor = NOISE, **options: Any) -> Tensor:
    """What the stock sampler makes of a prompt that names no shape."""
    words, nothing = (encode_prompts(demo, [text]) for text in ("a shape on sky", ""))
    return sample(model, noise=noise, steps=6, positive=words, negative=nothing, **options)


def distance(demo: DemoModel, see: TimmExtractor, latent: Tensor, shape: Tensor) -> float:
    picture = demo.vae.decode(latent).movedim(-1, 1)
    return self_similarity_distance(see(picture), see(shape))


def test_the_measured_distance_falls_for_every_picture_of_a_batch(
    demo: DemoModel, see: TimmExtractor, shape: Tensor
) -> None:
    guidance = StructureGuidance(see, demo.vae, shape, window=Window(), repeats=3)
    plain, guided = drawn(demo, demo.model), drawn(demo, attach(demo.model, guidance))
    for before, after in zip(plain.split(1), guided.split(1), strict=True):
        assert distance(demo, see, after, shape) < 0.8 * distance(demo, see, before, shape)


def test_a_row_of_a_batch_is_guided_as_if_alone(demo: DemoModel, see: TimmExtractor, shape: Tensor) -> None:
    model = attach(demo.model, StructureGuidance(see, demo.vae, shape, window=Window(0.0, 0.3)))
    alone = torch.cat([drawn(demo, model, one) for one in NOISE.split(1)])
    torch.testing.assert_close(drawn(demo, model), alone, atol=1e-3, rtol=1e-3)


def test_the_first_step_goes_down_the_slope_by_the_wanted_length(
    demo: DemoModel, see: TimmExtractor, shape: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small step lowers the loss as finite differences say, and is as long whatever the loss is scaled by."""
    from inversion_core.hosts import comfy_structure as module

    run = module._Run(StructureGuidance(see, demo.vae, shape, strength=0.002, window=Window()), demo.model)
    clean = demo.model.model.process_latent_in(demo.vae.encode(shape.flip(3).movedim(1, -1)))
    sigma = demo.model.model.model_sampling.sigma_max.reshape(1)
    moved = run.guided(clean, sigma)
    assert float((moved - clean).norm() / clean.norm()) == pytest.approx(0.002 * module.STEP, rel=1e-3)

    monkeypatch.setattr(module, "self_similarity_loss", lambda *x: 1e3 * self_similarity_loss(*x))
    again = module._Run(run.guidance, demo.model).guided(clean, sigma)
    torch.testing.assert_close(again, moved, atol=1e-5, rtol=1e-4)
    latents = (demo.model.model.process_latent_out(one) for one in (clean, moved))
    before, after = (self_similarity_loss(see(decode(demo.vae, one)), see(shape)) for one in latents)
    assert float(after) < float(before)


def test_strength_zero_and_the_model_put_in_are_the_plain_model_bit_for_bit(
    demo: DemoModel, see: TimmExtractor, shape: Tensor
) -> None:
    plain = drawn(demo, demo.model)
    guidance = StructureGuidance(see, demo.vae, shape)
    assert torch.equal(drawn(demo, attach(demo.model, replace(guidance, strength=0.0))), plain)
    guided = attach(demo.model, guidance)
    assert float((drawn(demo, guided) - plain).abs().max()) > 0.1
    assert torch.equal(drawn(demo, demo.model), plain)


def test_the_losses_are_told_and_the_window_is_kept(demo: DemoModel, see: TimmExtractor, shape: Tensor) -> None:
    guided = attach(demo.model, StructureGuidance(see, demo.vae, shape, window=Window(0.0, 0.5), repeats=2))
    assert last_losses(guided) == []
    drawn(demo, guided)
    limit = float(demo.model.model.model_sampling.percent_to_sigma(0.5))
    levels = [sigma for sigma, _ in last_losses(guided)]
    assert 2 <= len(levels) < 12
    assert levels == sorted(levels, reverse=True)
    assert min(levels) > limit


def test_the_look_of_a_picture_counts_if_asked_for(demo: DemoModel, see: TimmExtractor, shape: Tensor) -> None:
    look = torch.from_numpy(world.render(world.sample(1)).image)[None].movedim(-1, 1)

    def likeness(weight: float) -> float:
        guidance = StructureGuidance(see, demo.vae, shape, appearance=look, appearance_weight=weight, window=Window())
        picture = demo.vae.decode(drawn(demo, attach(demo.model, guidance), NOISE[:1])).movedim(-1, 1)
        found, wanted = see(picture).cls_normed, see(look).cls_normed
        assert found is not None and wanted is not None
        return float(torch.nn.functional.cosine_similarity(found, wanted))

    assert likeness(1.0) > likeness(0.0) + 0.05


def test_what_cannot_be_done_is_said(demo: DemoModel, see: TimmExtractor, shape: Tensor) -> None:
    guidance = StructureGuidance(see, demo.vae, shape)
    with pytest.raises(HostError, match="changed nothing: no step"):
        drawn(demo, attach(demo.model, replace(guidance, window=Window(0.0, 0.3))), denoise=0.2)
    with pytest.raises(HostError, match="latents of 16 channels"):
        attach(demo.model, replace(guidance, vae=type("Vae", (), {"latent_channels": 16})()))
    for wrong, message in (
        ({"strength": -1.0}, "strength is -1"),
        ({"repeats": 0}, "repeats is 0"),
        ({"appearance_weight": 1.0}, "needs an appearance picture"),
        ({"shape": shape[0]}, "shape picture is"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(guidance, **wrong)
