"""Learning a shape and an appearance on a toy model."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from inversion_core.learning.files import InversionFileError
from inversion_core.learning.guides import Guides, Look, Projection
from inversion_core.learning.inversion import Inversion, Kind
from inversion_core.learning.learn import job_of, learn
from inversion_core.learning.lesson import InversionLesson
from inversion_core.learning.material import Material, digest_of, prepare
from inversion_core.learning.model import LearningError, Prediction
from inversion_core.learning.offset import Sites
from inversion_core.learning.plan import OBJECTIVES, Framing, Plan
from inversion_core.learning.recipes import APPEARANCE_OBJECTIVES, SPENDING, Quality, plan_of, stages
from inversion_core.learning.silhouette import mask_embedding
from inversion_core.learning.trainer import Progress, Stage

from .toy import ToyModel, encode, picture

SHAPE = Plan("shape", "x", "red box", stages("shape", 30, 4), vectors=2, rank=2, variants=6)
APPEARANCE = replace(SHAPE, kind="appearance", stages=stages("appearance", 30, 4))
PLANS = pytest.mark.parametrize("plan", [SHAPE, APPEARANCE], ids=["shape", "appearance"])


OF_TOKEN = ("projected", "token_mse")
"""Objectives that know nothing of the model."""


def decode(latents: Tensor) -> Tensor:
    """The inverse of `encode`, roughly."""
    return (torch.nn.functional.interpolate(latents[:, :3], scale_factor=4.0) + 2) / 4


def see(pictures: Tensor) -> Tensor:
    """Eight random features, the same each time."""
    small = torch.nn.functional.adaptive_avg_pool2d(pictures, 4).flatten(1)
    return torch.tanh(small @ torch.randn(48, 8, generator=torch.Generator().manual_seed(0)))


def guides() -> Guides:
    torch.manual_seed(4)
    head = torch.nn.Linear(8, 8).requires_grad_(False)
    return Guides(Look.of(decode, see, *picture()), {"toy": torch.randn(8)}, Projection("toy", head, torch.randn(8)))


def material(plan: Plan) -> Material:
    return prepare(encode, *picture(), plan)


def same(a: Inversion, b: Inversion) -> bool:
    tokens = all(torch.equal(value, b.token[key]) for key, value in a.token.items())
    return tokens and all(
        torch.equal(x, y) for name in a.offset for x, y in zip(a.offset[name], b.offset[name], strict=True)
    )


@PLANS
@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_the_loss_on_fixed_noise_falls_and_the_model_stays(plan: Plan, prediction: Prediction) -> None:
    model = ToyModel(prediction)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, history = learn(model, material(plan), plan)
    assert history.evaluations[-1][1] < history.evaluations[0][1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not [module for module in model.modules() if module._forward_hooks]
    assert any(not torch.equal(found.token[key], found.initial[key]) for key in found.token)
    assert all(bool(change.up.any()) for change in found.offset.values())
    assert not found.token["toy"].requires_grad


def test_a_shape_goes_to_every_layer_of_a_block_and_an_appearance_to_some_unless_told() -> None:
    model = ToyModel()

    def layers(plan: Plan) -> set[str]:
        return set(InversionLesson(model, material(plan), plan).offset.names)

    attention = {f"block.{name}.{part}" for name in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")}
    assert layers(SHAPE) == attention | {"block.ff.net.2"}
    assert layers(APPEARANCE) == {"block.attn1.to_k", "block.attn1.to_v", "block.ff.net.2"}
    assert layers(replace(SHAPE, sites=Sites(("self",), ("to_q",)))) == {"block.attn1.to_q"}


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name not in OF_TOKEN])
@PLANS
def test_every_objective_alone_moves_what_is_learned(plan: Plan, objective: str) -> None:
    """Four rows; the offset gets its gradient through up, as down's is zero at first."""
    stage = Stage("s", 1, {"token": 1e-2, "offset": 1e-2}, {objective: 2.0})
    everywhere = Sites(("self", "cross"))
    lesson = InversionLesson(ToyModel(), material(plan), replace(plan, stages=(stage,), sites=everywhere), guides())
    losses = lesson.losses(stage, 0, range(4))
    assert losses.keys() == {objective}
    assert losses[objective].shape == (4,)
    losses[objective].sum().backward()
    moved = [float(up.grad.abs().sum()) for up, _ in lesson.offset.weights().values() if up.grad is not None]
    assert moved
    assert max(moved) > 0


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_every_objective_can_be_a_stage_whose_loss_falls(objective: str) -> None:
    stage = Stage("s", 30, {"token": 3e-2, "offset": 1e-2}, {objective: 1.0}, levels=(0.0, 0.7))
    plan = replace(APPEARANCE, stages=(stage,), sites=Sites(("self", "cross")))
    found, history = learn(ToyModel(), material(plan), plan, guides=guides())
    assert history.evaluations[-1][1] < history.evaluations[0][1]
    # The toy's self-attention comes before it reads the token.
    moved = not torch.equal(found.token["toy"], found.initial["toy"])
    assert moved is (objective != "attention_distillation")
    assert any(bool(change.up.any()) for change in found.offset.values()) is (objective not in OF_TOKEN)


def test_objectives_without_their_guides_are_refused() -> None:
    for objective in ("features", *OF_TOKEN):
        plan = replace(APPEARANCE, stages=(Stage("s", 1, {"token": 1.0}, {objective: 1.0}),))
        with pytest.raises(LearningError, match=f"{objective} needs features"):
            InversionLesson(ToyModel(), material(plan), plan)
    plan = replace(APPEARANCE, stages=(Stage("s", 1, {"token": 1.0}, {"token_mse": 1.0}),))
    with pytest.raises(LearningError, match="a vector of 5 for toy, but this model has toy of 8"):
        InversionLesson(ToyModel(), material(plan), plan, Guides(token={"toy": torch.ones(5)}))


def test_the_background_does_not_count_for_features() -> None:
    pictures, masks = picture()
    other = torch.where(masks[..., None] > 0, pictures, torch.rand(1, 1, 1, 3))
    looks = [Look.of(decode, see, one, masks).wanted for one in (pictures, other)]
    torch.testing.assert_close(*looks)
    assert not torch.equal(looks[0], Look.of(decode, see, 1 - pictures, masks).wanted)


def test_the_mask_embedding_explains_silhouettes() -> None:
    model, plan = ToyModel(), replace(SHAPE, vectors=1)
    _, masks = picture()
    found = mask_embedding(model, encode, masks, plan, steps=40)["toy"]
    again = mask_embedding(model, encode, masks, plan, steps=40)["toy"]
    assert torch.equal(found, again)
    stage = Stage("s", 1, {"token": 1.0}, {"diffusion": 1.0})
    silhouettes = prepare(encode, masks[..., None].expand(-1, -1, -1, 3), torch.ones_like(masks), plan)
    kept = replace(silhouettes, latents=silhouettes.reference.expand(6, -1, -1, -1), prompts=(("a <x>",),) * 6)
    losses = []
    for vectors in (model.words(plan.class_word)["toy"][:1], found):
        lesson = InversionLesson(model, kept, replace(plan, stages=(stage,)))
        lesson.token.vectors["toy"].data.copy_(vectors)
        losses.append(lesson.evaluate(stage))
    assert losses[1] < losses[0]


def test_weights_multiply_and_rows_do_not_depend_on_their_company() -> None:
    def losses(weight: float, *rows: int) -> Tensor:
        stage = Stage("s", 1, {"token": 1.0}, {"diffusion": weight})
        lesson = InversionLesson(ToyModel(), material(SHAPE), replace(SHAPE, stages=(stage,)))
        return lesson.losses(stage, 0, rows)["diffusion"]

    together = losses(1.0, 0, 1, 2, 3)
    assert together.unique().numel() == 4
    torch.testing.assert_close(torch.cat([losses(1.0, row) for row in range(4)]), together)
    torch.testing.assert_close(losses(3.0, 0, 1, 2, 3), 3 * together)


def test_stages_and_steps_see_other_noise() -> None:
    lesson = InversionLesson(ToyModel(), material(APPEARANCE), APPEARANCE)
    seen = [lesson.losses(stage, step, [0])["diffusion"] for stage in APPEARANCE.stages for step in (0, 1)]
    assert torch.cat(seen).unique().numel() == 4


def test_prompts_name_the_token_and_what_was_painted_and_what_stands_beside() -> None:
    shape = material(SHAPE).prompts
    assert all("<x>" in prompt and len(prompt.split()) >= 3 for prompts in shape for prompt in prompts)
    appearance = material(replace(APPEARANCE, beside="<chair>"))
    assert ["<chair>" in prompts[0] for prompts in appearance.prompts] == [False, True] * 3
    kept = encode(picture()[0])
    assert torch.equal(appearance.latents[1:2], kept)
    assert not torch.equal(appearance.latents[0:1], kept)


def test_the_same_seed_learns_the_same_and_another_does_not() -> None:
    first, _ = learn(ToyModel(), material(SHAPE), SHAPE)
    again, _ = learn(ToyModel(), material(SHAPE), SHAPE)
    other = replace(SHAPE, seed=1)
    assert same(first, again)
    assert not same(first, learn(ToyModel(), material(other), other)[0])


def test_a_killed_learning_ends_as_one_that_was_not(tmp_path: Path) -> None:
    def kill(news: Progress, _: InversionLesson) -> None:
        if news.done == 17:
            raise KeyboardInterrupt

    whole, _ = learn(ToyModel(), material(APPEARANCE), APPEARANCE)
    checkpoint = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        learn(ToyModel(), material(APPEARANCE), APPEARANCE, checkpoint=checkpoint, progress=kill)
    again, _ = learn(ToyModel(), material(APPEARANCE), APPEARANCE, checkpoint=checkpoint)
    assert same(whole, again)


def test_a_result_that_cannot_be_kept_is_not_lost(tmp_path: Path) -> None:
    """The disk is full when the file is written: what was learned so far is still there."""
    plan = replace(SHAPE, stages=stages("shape", 5, 2))
    checkpoint = tmp_path / "state.safetensors"

    def stop(news: Progress, _: InversionLesson) -> None:
        if news.done == 4:
            raise KeyboardInterrupt

    def full(_: Inversion) -> None:
        raise InversionFileError("No space left on device")

    whole, _ = learn(ToyModel(), material(plan), plan)
    with pytest.raises(KeyboardInterrupt):
        learn(ToyModel(), material(plan), plan, checkpoint=checkpoint, progress=stop)
    with pytest.raises(InversionFileError, match="No space left"):
        learn(ToyModel(), material(plan), plan, checkpoint=checkpoint, keep=full)
    kept, seen = [], []
    learn(
        ToyModel(),
        material(plan),
        plan,
        checkpoint=checkpoint,
        progress=lambda news, _: seen.append(news.done),
        keep=kept.append,
    )
    assert seen == [5]
    assert same(kept[0], whole)
    assert list(tmp_path.iterdir()) == []


def test_a_sample_is_a_latent_and_changes_with_what_is_learned() -> None:
    seen: list[Tensor] = []
    learn(ToyModel(), material(SHAPE), SHAPE, progress=lambda _, lesson: seen.append(lesson.sample(2)))
    assert seen[0].shape == (1, 4, 8, 8)
    assert bool(torch.isfinite(seen[-1]).all())
    assert not torch.equal(seen[0], seen[-1])


def test_a_job_is_its_model_its_pictures_and_its_plan() -> None:
    pictures, masks = picture()
    jobs = {
        job_of("m", digest_of(pictures, masks), SHAPE),
        job_of("other", digest_of(pictures, masks), SHAPE),
        job_of("m", digest_of(pictures, 1 - masks), SHAPE),
        job_of("m", digest_of(pictures, masks), replace(SHAPE, seed=1)),
        job_of("m", digest_of(pictures, masks), replace(SHAPE, stages=stages("shape", 31, 4))),
    }
    assert len(jobs) == 5
    assert job_of("m", digest_of(*picture()), SHAPE) in jobs


@pytest.mark.parametrize(
    ("pictures", "masks", "message"),
    [
        (torch.rand(1, 8, 8, 4), torch.ones(1, 8, 8), r"\(B, H, W, 3\)"),
        (torch.rand(0, 8, 8, 3), torch.ones(0, 8, 8), "at least one"),
        (torch.rand(2, 8, 8, 3), torch.ones(1, 8, 8), "one for each"),
        (torch.full((1, 8, 8, 3), float("nan")), torch.ones(1, 8, 8), "no numbers"),
        (torch.rand(2, 8, 8, 3), torch.stack([torch.ones(8, 8), torch.zeros(8, 8)]), "mask of picture 1"),
    ],
)
def test_pictures_nothing_can_be_learned_from_are_refused(pictures: Tensor, masks: Tensor, message: str) -> None:
    with pytest.raises(LearningError, match=message):
        prepare(encode, pictures, masks, SHAPE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "two words"}, "cannot be used"),
        ({"variants": 0}, "0 variants"),
        ({"stages": ()}, "0 stages"),
        ({"stages": (Stage("s", 1, {"token": 1.0}),)}, "objectives none"),
        ({"stages": (Stage("s", 1, {"token": 1.0}, {"beauty": 1.0}),)}, "objectives beauty"),
    ],
)
def test_plans_that_make_no_sense_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(LearningError, match=message):
        replace(SHAPE, **changes)


@pytest.mark.parametrize("quality", get_args(Quality))
@pytest.mark.parametrize("objective", list(APPEARANCE_OBJECTIVES))
@pytest.mark.parametrize("steps", [1, 4, 300])
def test_recipes_spend_the_steps_asked_for(quality: Quality, objective: str, steps: int) -> None:
    for kind in ("shape", "appearance"):
        found = stages(kind, steps, SPENDING[quality].batch, objective)
        assert sum(stage.steps for stage in found) == steps
        replace(SHAPE, stages=found)


def test_recipes_refuse_what_they_do_not_know() -> None:
    with pytest.raises(LearningError, match="0 steps"):
        stages("shape", 0, 4)
    with pytest.raises(LearningError, match="unknown objective 'beauty'"):
        stages("appearance", 1, 4, "beauty")

    with pytest.raises(LearningError, match=r"learning rate is -0\.1"):
        stages("shape", 1, 4, learning_rate=-0.1)
    with pytest.raises(LearningError, match="unknown sites 'hands': known are default, everything"):
        plan_of("shape", "a", "b", 1, sites="hands")
    with pytest.raises(LearningError, match="unknown framing 'upside down': known are centred, as pictured"):
        plan_of("shape", "a", "b", 1, framing="upside down")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("sites", "kinds"),
    [
        ("everything", {"attn1", "attn2", "ff"}),
        ("all attention", {"attn1", "attn2"}),
        ("self-attention", {"attn1"}),
        ("cross-attention", {"attn2"}),
    ],
)
@pytest.mark.parametrize("kind", get_args(Kind))
def test_sites_rank_and_rate_of_the_offset_may_be_chosen(kind: Kind, sites: str, kinds: set[str]) -> None:
    plan = plan_of(kind, "a", "word", 3, sites=sites, rank=3, learning_rate=0.5)
    offset = InversionLesson(ToyModel(), material(plan), plan).offset
    assert {name.split(".")[1] for name in offset.names} == kinds
    assert {up.shape[1] for up, _ in offset.weights().values()} == {3}
    assert plan.stages[-1].rates["offset"] == 0.5


def test_a_shape_as_pictured_is_learned_in_its_place() -> None:
    """Every variant's mask is the picture's own; centred, none is."""
    kept = {}
    for framing in get_args(Framing):
        found = material(plan_of("shape", "a", "word", 3, "fast", framing=framing))
        kept[framing] = sum(torch.equal(mask[None], found.reference_masks) for mask in found.masks)
    assert kept == {"centred": 0, "as pictured": 64}


def test_sites_of_another_model_are_refused_with_what_there_is() -> None:
    plan = plan_of("shape", "a", "word", 3, sites="B-LoRA (SDXL)")
    with pytest.raises(LearningError, match=r"within output_blocks\.0\.1\.: the model has .* block\.attn1"):
        InversionLesson(ToyModel(), material(plan), plan)


def test_an_appearance_is_learned_inside_its_border() -> None:
    """The picture's mask ends within cells; those are the shape's business."""
    grey = ((material(SHAPE).masks > 0) & (material(SHAPE).masks < 1)).any()
    found = material(replace(APPEARANCE, variants=12)).masks
    whole = [((one == 0) | (one == 1)).all() for one in found]
    assert bool(grey)
    assert sum(map(bool, whole)) > 0
