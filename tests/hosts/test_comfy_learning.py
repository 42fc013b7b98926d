"""Learning on ComfyUI's own models: gradients, nothing left behind, and the same result through stock loaders."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.lora
import comfy.model_sampling
import comfy.sd
import comfy.text_encoders.flux
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from demo import world
from demo.generate import generate
from demo.model import DemoModel, load_demo_model
from demo.text import WIDTH
from demo.vit import BACKBONE
from demo.weights import FOLDER
from inversion_core.features import Backbone, TimmExtractor, load
from inversion_core.hosts import comfy_inversion
from inversion_core.hosts.base import HostError
from inversion_core.hosts.comfy_inversion import apply_inversion, knows_word, with_tokens
from inversion_core.hosts.comfy_learning import ComfyLearningModel, decoder, fingerprint, learning_model
from inversion_core.learning import objectives
from inversion_core.learning.files import embedding, lora
from inversion_core.learning.guides import Guides, Look
from inversion_core.learning.inversion import Inversion, LowRankWeights
from inversion_core.learning.learn import learn
from inversion_core.learning.lesson import InversionLesson
from inversion_core.learning.material import Material, prepare
from inversion_core.learning.model import LearningError
from inversion_core.learning.offset import Sites
from inversion_core.learning.plan import Plan
from inversion_core.learning.recipes import SITES, stages
from inversion_core.learning.trainer import Progress, Stage

from .models import POOLED, Patcher, demo_patcher, random, sd15_patcher, sd21_patcher, sdxl_patcher
from .text_models import demo_clip, sd1_clip, sd2_clip, sdxl_clip

LATENT = (2, 4, 16, 16)
SHAPE = Plan("shape", "x", "shape", stages("shape", 20, 2), vectors=2, rank=2, variants=4)
APPEARANCE = replace(SHAPE, kind="appearance", class_word="striped", stages=stages("appearance", 20, 2))


MODELS = pytest.mark.parametrize(
    ("model", "clip"),
    [(demo_patcher, demo_clip), (sd15_patcher, sd1_clip), (sd21_patcher, sd2_clip), (sdxl_patcher, sdxl_clip)],
    ids=["demo", "SD1.x", "SD2.x", "SDXL"],
)


@pytest.fixture(scope="module")
def demo() -> DemoModel:
    with torch.inference_mode():
        return load_demo_model()


def heart() -> tuple[Tensor, Tensor]:
    rendered = world.render(world.sample(50_001, shapes=("heart",)))
    return torch.from_numpy(rendered.image)[None], torch.from_numpy(rendered.mask)[None]


def demo_material(demo: DemoModel, plan: Plan) -> Material:
    return prepare(lambda picture: demo.model.model.process_latent_in(demo.vae.encode(picture)), *heart(), plan)


def random_material(plan: Plan) -> Material:
    """Without an autoencoder."""
    return prepare(
        lambda picture: torch.nn.functional.avg_pool2d(picture.permute(0, 3, 1, 2), 8)[:, [0, 1, 2, 0]], *heart(), plan
    )


@contextmanager
def unchanged(*modules: nn.Module) -> Iterator[None]:
    """The very parameters, bit for bit, with their flags and without a hook, are there afterwards."""
    objects = [dict(module.named_parameters()) for module in modules]
    flags = [{name: value.requires_grad for name, value in found.items()} for found in objects]
    values = [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]
    yield
    for module, parameters, flag, before in zip(modules, objects, flags, values, strict=True):
        after = dict(module.named_parameters())
        assert all(after[name] is value and value.grad is None for name, value in parameters.items())
        assert {name: value.requires_grad for name, value in after.items()} == flag
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        assert not [one for one in module.modules() if one._forward_hooks or one._forward_pre_hooks]
        assert not [one for one in module.modules() if "forward" in vars(one)]


def some_inversion(model: Patcher, clip: Any, family: str = "", **changes: Any) -> Inversion:
    """A strong random one, for self- and cross-attention."""
    plan = replace(SHAPE, sites=Sites(("self", "cross")))
    with learning_model(model, clip, LATENT) as opened:
        lesson = InversionLesson(opened, random_material(plan), plan)
        found = lesson.inversion({})
    offset = {
        name: LowRankWeights(0.3 * random(*up.shape, seed=i), 0.3 * random(*down.shape, seed=100 + i))
        for i, (name, (up, down)) in enumerate(found.offset.items())
    }
    token = {key: value + 0.3 * random(*value.shape, seed=7) for key, value in found.token.items()}
    return replace(found, offset=offset, token=token, family=family or found.family, **changes)


def encoded(clip: Any, text: str) -> tuple[Tensor, Tensor]:
    """What CLIP Text Encode gives: context and pooled."""
    return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [SHAPE, APPEARANCE], ids=["shape", "appearance"])
def test_on_the_demo_model_the_loss_on_fixed_noise_falls_and_nothing_else_changes(demo: DemoModel, plan: Plan) -> None:
    material = demo_material(demo, plan)
    with unchanged(demo.model.model, demo.clip.cond_stage_model):
        with learning_model(demo.model, demo.clip, LATENT) as opened:
            found, history = learn(opened, material, plan, micro_batch=2)
        assert torch.is_inference_mode_enabled()
    assert len(history.losses["diffusion"]) == 20
    model, clip = apply_inversion(demo.model, demo.clip, found)
    # What is kept is an average over the steps, and what is used is a patch: for those the loss must have fallen.
    losses = []
    for one, vectors in ((demo.model, found.initial), (model, found.initial), (model, found.token)):
        with learning_model(one, demo.clip, LATENT) as opened:
            lesson = InversionLesson(opened, material, plan)
            for key, value in lesson.token.vectors.items():
                value.data.copy_(vectors[key])
            losses.append(lesson.evaluate(plan.stages[-1]))
    assert losses[0] == pytest.approx(history.evaluations[0][1], rel=1e-4)
    assert losses[2] < losses[1] < losses[0]
    without = DemoModel(demo.model, with_tokens(demo.clip, {"x": found.initial}), demo.vae)
    pictures = [
        generate(one, ["a red <x> on snow"], [1], steps=2) for one in (DemoModel(model, clip, demo.vae), without)
    ]
    assert not torch.equal(*pictures)


@MODELS
def test_gradients_reach_token_and_offset_on_every_family(model: Any, clip: Any) -> None:
    patcher, text = model(), clip()
    with unchanged(patcher.model, text.cond_stage_model):
        for plan in (SHAPE, APPEARANCE):
            material = random_material(plan)
            with learning_model(patcher, text, LATENT) as opened:
                lesson = InversionLesson(opened, material, plan)
                losses = lesson.losses(plan.stages[-1], 0, range(2))
                torch.stack([loss.sum() for loss in losses.values()]).sum().backward()
            gradients = [vectors.grad for vectors in lesson.token.vectors.values()]
            gradients += [up.grad for up, _ in lesson.offset.weights().values()]
            assert len(gradients) > 4
            assert all(one is not None and bool(torch.isfinite(one).all()) and bool(one.any()) for one in gradients)


@MODELS
def test_checkpointing_gives_the_same_gradients_and_keeps_less(model: Any, clip: Any) -> None:
    patcher, text = model(), clip()
    found = []
    with unchanged(patcher.model, text.cond_stage_model):
        for saving in (False, True):
            plan = replace(APPEARANCE, stages=stages("appearance", 20, 2))
            material, kept = random_material(plan), set()

            def keep(tensor: Tensor, kept: set = kept) -> Tensor:
                kept.add((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()))
                return tensor

            with learning_model(patcher, text, LATENT) as opened:
                lesson = InversionLesson(opened, material, plan)
                with torch.no_grad():
                    for up, _ in lesson.offset.weights().values():
                        up.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
                assert not saving or lesson.save_memory()
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    losses = lesson.losses(plan.stages[-1], 0, range(2))
                torch.stack([loss.sum() for loss in losses.values()]).sum().backward()
                assert not saving or not lesson.save_memory()
                gradients = [one.grad for module in lesson.groups.values() for one in module.parameters()]
            found.append((gradients, sum(size for _, size in kept)))
    for plain, sparing in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(plain, sparing, rtol=1e-3, atol=1e-6)
    assert found[1][1] < 0.6 * found[0][1]


def test_what_a_backbone_sees_in_the_decoded_estimate_can_be_learned_by(demo: DemoModel) -> None:
    backbone = Backbone(**BACKBONE)
    extractor = TimmExtractor(load(backbone, FOLDER / backbone.file), backbone)

    def see(pictures: Tensor) -> Tensor:
        found = extractor(pictures, grad=pictures.requires_grad).cls_normed
        assert found is not None
        return found

    stage = Stage("s", 4, {"token": 1e-2, "offset": 5e-3}, {"features": 1.0}, 2, levels=(0.0, 0.3))
    plan = replace(APPEARANCE, stages=(stage,))
    material = demo_material(demo, plan)
    weights = demo.vae.first_stage_model
    with (
        unchanged(demo.model.model, demo.clip.cond_stage_model, weights),
        learning_model(demo.model, demo.clip, LATENT) as opened,
        decoder(opened, demo.vae) as decode,
    ):
        # Lossy as the autoencoder is, it must be far nearer to the picture than grey is.
        pictures, masks = heart()
        shown = decode(material.reference).permute(0, 2, 3, 1)
        assert float((shown - pictures).abs().mean()) < 0.3 * float((0.5 - pictures).abs().mean())
        guides = Guides(Look.of(decode, see, pictures, masks))
        lesson = InversionLesson(opened, material, plan, guides)
        lesson.losses(stage, 0, [0])["features"].sum().backward()
        learned = [one.grad for one in lesson.token.vectors.values()]
        learned += [up.grad for up, _ in lesson.offset.weights().values()]
        assert all(one is not None and bool(one.any()) for one in learned)
        _, history = learn(opened, material, plan, guides=guides, micro_batch=2)
    assert history.evaluations[-1][1] < history.evaluations[0][1]


def test_a_gradient_is_the_slope_of_the_loss() -> None:
    """Central differences on one vector of the token, through text encoder and UNet."""
    plan = replace(SHAPE, vectors=1)
    material = random_material(plan)
    with learning_model(demo_patcher(), demo_clip(), LATENT) as opened:
        lesson = InversionLesson(opened, material, plan)
        (vector,) = lesson.token.vectors.values()
        direction = random(*vector.shape, seed=3)

        def loss() -> Tensor:
            return lesson.losses(plan.stages[0], 0, [0])["diffusion"].sum()

        loss().backward()
        assert vector.grad is not None
        slope = float((vector.grad * direction).sum())
        found = []
        for side in (0.02, -0.02):
            with torch.no_grad():
                vector.add_(side * direction)
                found.append(float(loss()))
                vector.sub_(side * direction)
    assert slope == pytest.approx((found[0] - found[1]) / 0.04, rel=0.05)


def test_what_is_replaced_comes_back_after_an_error() -> None:
    model, clip = demo_patcher(), demo_clip()
    with (
        unchanged(model.model, clip.cond_stage_model),
        pytest.raises(RuntimeError, match="inside"),
        learning_model(model, clip, LATENT),
    ):
        raise RuntimeError("inside")


def test_cancel_ends_it_within_a_step_and_the_rest_can_be_learned_later(demo: DemoModel, tmp_path: Path) -> None:
    """On one core ComfyUI's kernels give the same bits twice."""
    plan = replace(SHAPE, stages=stages("shape", 5, 2))
    material, checkpoint = demo_material(demo, plan), tmp_path / "state.safetensors"

    def cancel(news: Progress, _: InversionLesson) -> None:
        if news.done == 3:
            raise KeyboardInterrupt

    results = []
    for first in (None, cancel):
        with unchanged(demo.model.model, demo.clip.cond_stage_model):
            if first is not None:
                with pytest.raises(KeyboardInterrupt), learning_model(demo.model, demo.clip, LATENT) as opened:
                    learn(opened, material, plan, checkpoint=checkpoint, progress=first)
            with learning_model(demo.model, demo.clip, LATENT) as opened:
                results.append(learn(opened, material, plan, checkpoint=checkpoint)[0])
    assert all(torch.equal(value, results[1].token[key]) for key, value in results[0].token.items())
    for name, change in results[0].offset.items():
        assert torch.equal(change.up, results[1].offset[name].up)
    assert list(tmp_path.iterdir()) == []


def test_it_learns_on_the_model_as_it_is_patched() -> None:
    """A LoRA on the model must change the losses."""
    model, clip = demo_patcher(), demo_clip()
    patched, _ = apply_inversion(model, clip, some_inversion(model, clip))
    found = []
    for one in (model, patched, model):
        with learning_model(one, clip, LATENT) as opened:
            lesson = InversionLesson(opened, random_material(SHAPE), SHAPE)
            found.append(lesson.losses(SHAPE.stages[0], 0, [0])["diffusion"].detach())
    assert torch.equal(found[0], found[2])
    assert abs(float(found[0] - found[1])) > 1e-3


# --- the protocol -----------------------------------------------------------------------------------------------------


@MODELS
def test_the_prediction_is_comfyuis_own_denoised_picture(model: Any, clip: Any) -> None:
    patcher, text = model(), clip()
    noisy, level = random(2, 4, 16, 16, seed=1), torch.tensor([0.1, 0.8])
    with learning_model(patcher, text, LATENT) as opened, torch.no_grad():
        conditioning = opened.encode(["a red star", "a blue circle"], {})
        output = opened.predict(noisy, level, conditioning)
        alpha, sigma = opened.schedule(level)
        torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(2))
        ve = (sigma / alpha).view(-1, 1, 1, 1)
        extra = opened._conditions(noisy, conditioning)
        denoised = patcher.model.apply_model(noisy / alpha.view(-1, 1, 1, 1), ve.flatten(), **extra)
        found = objectives.clean_estimate(opened.prediction, output, noisy, opened.schedule(level))
    torch.testing.assert_close(found, denoised, rtol=1e-3, atol=1e-3)


@MODELS
def test_prompts_are_encoded_as_clip_text_encode_does(model: Any, clip: Any) -> None:
    text = clip()
    with learning_model(model(), text, LATENT) as opened:
        found = opened.encode(["a red star", "", "a red star"], {})
    for row, prompt in enumerate(["a red star", "", "a red star"]):
        context, pooled = encoded(text, prompt)
        assert torch.equal(found.context[row : row + 1], context)
        assert found.pooled is not None
        assert torch.equal(found.pooled[row : row + 1], pooled)


@MODELS
def test_places_are_where_the_vectors_stand(model: Any, clip: Any) -> None:
    with learning_model(model(), clip(), LATENT) as opened:
        words = opened.words("red")
        tokens = {"x": {key: torch.ones(3, value.shape[1]) for key, value in words.items()}}
        found = opened.encode(["red <x> red", "<x>", "red"], tokens).places["x"]
    before = len(next(iter(words.values())))
    assert [row.nonzero().flatten().tolist() for row in found] == [
        [1 + before, 2 + before, 3 + before],
        [1, 2, 3],
        [],
    ]


def test_attentions_are_those_of_the_unet() -> None:
    with learning_model(sdxl_patcher(), sdxl_clip(), LATENT) as opened:
        found, behind = opened.attentions(), opened.feed_forwards()
    modules = dict(opened._base.diffusion_model.named_modules())
    assert {name for name in modules if name.endswith(("attn1", "attn2"))} == set(found)
    for name, site in found.items():
        assert site.kind == ("self" if name.endswith("attn1") else "cross")
        assert site.part == {"i": "encoder", "m": "middle", "o": "decoder"}[name[0]]
        assert all(layer is modules[f"{name}.{part}"] for part, layer in site.projections.items())
    assert behind == {name: modules[name] for name in modules if name.endswith((".ff.net.0.proj", ".ff.net.2"))}
    assert len(behind) == len(found)


def test_b_lora_has_content_and_style_in_a_block_of_sdxl_each() -> None:
    with learning_model(sdxl_patcher(), sdxl_clip(), LATENT) as opened:
        shape, look = (set(sites.layers(opened)) for sites in SITES["B-LoRA (SDXL)"].values() if sites is not None)
    assert len(shape) == 2 * 2 * 4  # blocks, attentions, projections
    assert {name[:18] for name in shape} == {"output_blocks.0.1."}
    assert look == {name.replace("output_blocks.0.", "output_blocks.1.") for name in shape}


@MODELS
def test_words_are_rows_of_the_table(model: Any, clip: Any) -> None:
    text = clip()
    with learning_model(model(), text, LATENT) as opened:
        both, one = opened.words("red star"), opened.words("star")
        assert all(len(value) == 0 for value in opened.words("").values())
    for key, value in both.items():
        assert torch.equal(value[-len(one[key]) :], one[key])
        table = getattr(text.cond_stage_model, key).transformer.get_input_embeddings().weight.float()
        assert all(bool((table == row).all(1).any()) for row in value)


@pytest.mark.parametrize("make", [demo_clip, sdxl_clip])
def test_a_known_word_is_one_token(make: Any) -> None:
    clip = make()
    assert knows_word(clip, "star")
    assert not knows_word(clip, "my-star")


def test_the_fingerprint_is_of_the_weights_whether_loaded_or_not() -> None:
    model, clip = demo_patcher(), demo_clip()
    first = fingerprint(model, clip)
    inversion = some_inversion(model, clip)
    patched, placed = apply_inversion(model, clip, inversion)
    unloaded = fingerprint(patched, placed)
    assert unloaded != first
    assert fingerprint(apply_inversion(model, clip, inversion, offset_strength=0.5)[0], clip) != unloaded
    with learning_model(patched, clip, LATENT):
        pass
    assert fingerprint(patched, placed) == unloaded
    assert fingerprint(model, clip) == first
    other = demo_patcher()
    with torch.no_grad():
        other.model.diffusion_model.out[2].bias[0] += 1
    assert fingerprint(other, clip) != first


def test_models_that_cannot_be_learned_on_are_refused() -> None:
    clip = demo_clip()
    dit: Any = SimpleNamespace(model=SimpleNamespace(diffusion_model=nn.Linear(1, 1)))
    with pytest.raises(HostError, match="UNet models.*this model is a Linear"), learning_model(dit, clip, LATENT):
        pass
    inpainting = demo_patcher()
    inpainting.model.concat_keys = ("mask", "masked_image")
    with pytest.raises(HostError, match="inpainting"), learning_model(inpainting, clip, LATENT):
        pass
    edm = demo_patcher()
    edm.model.model_sampling = type("Sampling", (nn.Module, comfy.model_sampling.EDM), {})()
    with pytest.raises(HostError, match="EDM"), learning_model(edm, clip, LATENT):
        pass


# --- using it ---------------------------------------------------------------------------------------------------------


def predicted(model: Patcher, clip: Any, text: str) -> Tensor:
    """One evaluation of the model on a stock prompt."""
    with learning_model(model, clip, LATENT) as opened, torch.no_grad():
        return opened.predict(random(1, 4, 16, 16, seed=5), torch.tensor([0.6]), opened.encode([text], {}))


@MODELS
def test_apply_is_what_was_learned(model: Any, clip: Any) -> None:
    """Hooks while learning, a stock weight patch afterwards: the same model."""
    patcher, text = model(), clip()
    inversion = some_inversion(patcher, text)
    with unchanged(patcher.model, text.cond_stage_model), learning_model(patcher, text, LATENT) as opened:
        plan = replace(SHAPE, sites=Sites(("self", "cross")))
        lesson = InversionLesson(opened, random_material(plan), plan)
        with torch.no_grad():
            for name, (up, down) in lesson.offset.weights().items():
                up.copy_(inversion.offset[name].up)
                down.copy_(inversion.offset[name].down)
            conditioning = opened.encode(["a red <x>"], {"x": inversion.token})
            with lesson.offset.applied(lesson._layers):
                expected = opened.predict(random(1, 4, 16, 16, seed=5), torch.tensor([0.6]), conditioning)
    found = predicted(*apply_inversion(patcher, text, inversion), "a red <x>")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    plain = predicted(patcher, with_tokens(text, {"x": inversion.initial}), "a red <x>")
    assert float((plain - expected).abs().max()) > 0.01


def test_stock_loaders_give_the_same_bits(tmp_path: Path) -> None:
    """Load LoRA and embedding: in ComfyUI's own code, from the exported files."""
    model, clip = demo_patcher(), demo_clip(tmp_path)
    inversion = some_inversion(model, clip)
    save_file(embedding(inversion), tmp_path / "rust.safetensors")
    save_file(lora(inversion), tmp_path / "rust-lora.safetensors")
    stock, _ = comfy.sd.load_lora_for_models(model, clip, load_file(tmp_path / "rust-lora.safetensors"), 0.7, 0.0)
    ours, placed = apply_inversion(model, clip, inversion, offset_strength=0.7)
    for text, plain in (
        ("a red <x>, on snow", "a red embedding:rust, on snow"),
        ("<x>", "embedding:rust"),
        ("a (<x>:1.3) (star:0.8)", "a (embedding:rust :1.3) (star:0.8)"),
    ):
        assert torch.equal(encoded(placed, text)[0], encoded(clip, plain)[0])
    assert torch.equal(predicted(ours, placed, "a <x>"), predicted(stock, clip, "a embedding:rust"))


@pytest.mark.parametrize("text", ["(<x>)", "(<x>:1.3)", "((<x>))", "(a red <x> on snow:0.5)"])
def test_weights_weigh(text: str) -> None:
    clip = with_tokens(demo_clip(), {"x": {"clip_l": random(2, WIDTH, seed=1)}})
    weights = [[weight for one, weight in chunk if isinstance(one, Tensor)] for chunk in clip.tokenize(text)["l"]]
    expected = {"(<x>)": 1.1, "(<x>:1.3)": 1.3, "((<x>))": 1.21, "(a red <x> on snow:0.5)": 0.5}[text]
    assert weights == [[pytest.approx(expected)] * 2]


@pytest.mark.parametrize("text", ["a<x>b", "a <x> b", "a  <x>b", "a\n<x>\nb"])
def test_a_name_needs_no_spaces_around_it(text: str) -> None:
    clip = with_tokens(demo_clip(), {"x": {"clip_l": random(1, WIDTH, seed=1)}})
    kinds = ["x" if isinstance(one, Tensor) else one for one, _ in clip.tokenize(text)["l"][0]]
    plain = [one for one, _ in clip.tokenize("a b")["l"][0]]
    assert kinds[:4] == [plain[0], plain[1], "x", plain[2]]


def test_learned_words_are_answered_in_the_form_of_this_comfyui(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer ones also want the name. The form of the one that is installed is tested by every prompt."""
    newer = staticmethod(lambda *_: (None, "", ""))
    monkeypatch.setattr(comfy_inversion.SDTokenizer, "_try_get_embedding", newer)
    comfy_inversion._names_are_answered.cache_clear()
    try:
        clip = with_tokens(demo_clip(), {"x": {"clip_l": random(1, WIDTH, seed=1)}})
        vectors, name, rest = clip.tokenizer.clip_l._try_get_embedding("<x> on snow")
    finally:
        comfy_inversion._names_are_answered.cache_clear()
    assert vectors.shape == (1, WIDTH) and (name, rest) == ("<x>", "on snow")


def test_t5_lets_tokens_in_too() -> None:
    """Beside clip_l in Flux's prompts; nothing was learned for T5 yet, but its embeddings have a place."""
    tokenizer = comfy.text_encoders.flux.FluxTokenizer()
    clip: Any = SimpleNamespace(tokenizer=tokenizer)
    clip.clone = lambda: SimpleNamespace(tokenizer=tokenizer)
    widths = {"clip_l": 768, "t5xxl": 4096}
    learned = {name: random(2, width, seed=1) for name, width in widths.items()}
    tokens = with_tokens(clip, {"x": learned}).tokenizer.tokenize_with_weights("a (<x>:1.3) house")
    for key, name in (("l", "clip_l"), ("t5xxl", "t5xxl")):
        placed = [(one, weight) for chunk in tokens[key] for one, weight in chunk if isinstance(one, Tensor)]
        assert [weight for _, weight in placed] == [pytest.approx(1.3)] * 2
        assert torch.equal(torch.stack([one for one, _ in placed]), learned[name])
    with pytest.raises(HostError, match="learned for clip_l, but this CLIP wants t5xxl"):
        with_tokens(clip, {"x": {"clip_l": learned["clip_l"]}})


def test_an_encoder_without_places_is_refused_and_the_offset_offered() -> None:
    clip: Any = SimpleNamespace(tokenizer=SimpleNamespace())
    clip.clone = lambda: clip
    with pytest.raises(HostError, match="offset alone: Save Inversion with stock_files, then Load LoRA"):
        with_tokens(clip, {"x": {"clip_l": random(1, 768, seed=1)}})


def test_several_inversions_chain_and_names_stay_apart() -> None:
    model, clip = demo_patcher(), demo_clip()
    first, second = some_inversion(model, clip), some_inversion(model, clip, name="x-2", kind="appearance")
    one = apply_inversion(model, clip, first)
    model_2, clip_2 = apply_inversion(*one, second)
    tokens = [t for t, _ in clip_2.tokenize("a <x-2> <x> <y>")["l"][0] if isinstance(t, Tensor)]
    expected = [*second.token["clip_l"], *first.token["clip_l"]]
    assert all(torch.equal(a, b) for a, b in zip(tokens, expected, strict=True))
    assert {key: len(found) for key, found in model_2.patches.items()} == dict.fromkeys(model_2.patches, 2)
    assert not [t for t, _ in clip.tokenize("<x>")["l"][0] if isinstance(t, Tensor)]
    with pytest.raises(HostError, match="<x> is already in use"):
        apply_inversion(*one, first)


def test_strength_zero_is_the_class_word_on_the_untouched_model() -> None:
    model, clip = demo_patcher(), demo_clip()
    with learning_model(model, clip, LATENT) as opened:
        words = opened.words("star")
    inversion = replace(some_inversion(model, clip), initial=words, token={"clip_l": words["clip_l"] + 1})
    neutral, placed = apply_inversion(model, clip, inversion, 0.0, 0.0)
    assert neutral.patches == {}
    assert torch.equal(encoded(placed, "a red <x>")[0], encoded(clip, "a red star")[0])


def test_what_does_not_fit_is_refused_by_name() -> None:
    model, clip = demo_patcher(), demo_clip()
    inversion = some_inversion(model, clip)
    with pytest.raises(LearningError, match=r"<x> was learned for the demo model, but this model is SD1\.x"):
        apply_inversion(sd15_patcher(), clip, inversion)
    with pytest.raises(HostError, match=r"only \d+ of them"):
        apply_inversion(sd15_patcher(), clip, replace(inversion, family="SD1.x"))
    with pytest.raises(HostError, match="learned for clip_l, but this CLIP wants clip_g"):
        with_tokens(sdxl_clip(), {"x": {"clip_l": torch.zeros(1, WIDTH - POOLED)}})
    with pytest.raises(HostError, match=f"width 5 for clip_l, but this CLIP's are {WIDTH}"):
        with_tokens(clip, {"x": {"clip_l": torch.zeros(1, 5)}})


def test_a_frozen_shape_stands_beside_an_appearance() -> None:
    """The second inversion is learned on clones that know the first."""
    model, clip = demo_patcher(), demo_clip()
    shape = some_inversion(model, clip, name="chair")
    plan = replace(APPEARANCE, beside="<chair>", stages=stages("appearance", 2, 2))
    with learning_model(*apply_inversion(model, clip, shape), LATENT) as opened:
        assert isinstance(opened, ComfyLearningModel)
        found, _ = learn(opened, random_material(plan), plan)
    both = apply_inversion(*apply_inversion(model, clip, shape), found)
    tokens = [t for t, _ in both[1].tokenize("a <x> <chair>")["l"][0] if isinstance(t, Tensor)]
    assert len(tokens) == 4
    assert np.isfinite(predicted(*both, "a <x> <chair>").numpy()).all()
