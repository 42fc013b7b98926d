"""The demo's diffusion transformer and how it is trained, without its trained weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.model_base
import pytest
import torch

from demo.dit import build_dit
from demo.generate import generate
from demo.train import latents
from demo.train.dit import DitStage

PICTURES = 64


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DitStage]:
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode(False):
        patch.setattr(latents, "PICTURES", PICTURES)
        yield DitStage(torch.device("cpu"), steps=10, runs=tmp_path_factory.mktemp("runs"))


def test_it_is_comfyuis_sd3_and_flows() -> None:
    base = build_dit()
    assert type(base) is comfy.model_base.SD3
    assert type(base.diffusion_model) is comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper
    assert base.model_type is comfy.model_base.ModelType.FLOW
    assert float(base.model_sampling.sigma_max) == 1.0


def test_its_size_leaves_all_the_demos_weights_under_their_bound() -> None:
    assert 2 * sum(value.numel() for value in build_dit().diffusion_model.state_dict().values()) < 4_100_000


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (32, 32), (15, 16)])
def test_it_takes_latents_of_any_size(stage: DitStage, size: tuple[int, int]) -> None:
    with torch.no_grad():
        made = stage.model(torch.randn(2, 4, *size), torch.tensor([1.0, 1000.0]), torch.randn(2, 32, 128))
    assert made.shape == (2, 4, *size)


def test_an_untrained_network_predicts_nothing(stage: DitStage) -> None:
    with torch.no_grad():
        made = stage.model(torch.randn(2, 4, 16, 16), torch.ones(2), torch.randn(2, 32, 128), y=torch.randn(2, 128))
    assert (made == 0).all()


def test_a_step_is_a_function_of_its_number(stage: DitStage) -> None:
    first = float(stage.loss(3))
    assert float(stage.loss(4)) != first
    stage.encoded.clear()
    assert float(stage.loss(3)) == first


def velocity_towards(clean: torch.Tensor) -> Any:
    """A network that knows the answer: on the straight path x = s n + (1 - s) c the velocity n - c is (x - c) / s."""

    def network(x: torch.Tensor, timestep: torch.Tensor, **_: Any) -> torch.Tensor:
        return (x.float() - clean) / (timestep / 1000).view(-1, 1, 1, 1)

    return network


def test_a_network_that_knows_the_answer_has_no_loss(stage: DitStage, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = stage.latents.draw
    monkeypatch.setattr(stage.latents, "draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    monkeypatch.setattr(stage, "network", lambda x, t, **given: velocity_towards(drawn[-1].clean)(x, t, **given))
    assert float(stage.loss(0)) < 1e-6


def test_comfyuis_sampler_follows_what_the_loss_teaches(stage: DitStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs, time and scale are those of ComfyUI: a network without loss arrives at the picture from pure noise."""
    clean = stage.latents.latents[:1].float()
    network = velocity_towards(clean)
    monkeypatch.setattr(stage.model, "forward", lambda x, t, context=None, y=None, **_: network(x, t))
    made = generate(stage.demo, ["a red star"], [1], steps=4, cfg=1.0)
    assert (made.cpu() - stage.demo.vae.decode(clean).cpu()).abs().max() < 2e-3


def test_a_few_steps_lower_the_loss_and_leave_the_text_encoder_alone(stage: DitStage) -> None:
    text = {key: value.clone() for key, value in stage.demo.clip.cond_stage_model.state_dict().items()}
    with torch.inference_mode(False), torch.enable_grad():
        before = stage.loss(0).item()
        optimiser = torch.optim.AdamW(stage.model.parameters(), lr=2e-3)
        for step in range(20):
            optimiser.zero_grad()
            stage.loss(step).backward()
            optimiser.step()
        after = stage.loss(0).item()
    assert after < 0.9 * before
    assert all(torch.equal(value, text[key]) for key, value in stage.demo.clip.cond_stage_model.state_dict().items())


def test_striped_pictures_are_drawn_oftener_and_errors_inside_the_object_count_more(stage: DitStage) -> None:
    striped = [f.appearance.texture == "striped" for f in stage.latents.factors]
    share = stage.latents.shares[striped].sum()
    assert share == pytest.approx(3 * sum(striped) / (len(striped) + 2 * sum(striped)))
    assert stage.latents.weights.min() == 1.0
    assert stage.latents.weights.max() == 4.0


def test_pictures_are_made_once(stage: DitStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "PICTURES", 2)
    first = latents.Latents(tmp_path, stage.demo.vae, torch.device("cpu"))
    monkeypatch.setattr(stage.demo.vae, "encode", lambda _: pytest.fail("encoded again"))
    again = latents.Latents(tmp_path, stage.demo.vae, torch.device("cpu"))
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.weights, again.weights)
