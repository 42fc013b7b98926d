"""Injections on diffusers' pipelines with random weights: what is changed, what is left alone, what is refused.

That the result is the right one says `test_diffusers_parity.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo.vocabulary import TOKENIZER_FOLDER
from inversion_core.attention import AttentionEdit
from inversion_core.bank import ReferenceBank
from inversion_core.hosts.base import HostError
from inversion_core.hosts.diffusers import Prompt, attach, sites_of
from inversion_core.injection import Injection, Window
from inversion_core.presets import PRESETS
from inversion_core.reference import Reference

from .diffusers_models import FAMILIES, Pipe, euler, pipeline
from .models import NEGATIVE, NOISE, POOLED, POSITIVE, prompt, random

# numpy 2 asks arrays for a keyword that torch's tensors do not know, inside diffusers' schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

VISIBLE, ROUNDING = 1e-3, 1e-4
"""Largest differences of latents: the least that counts as a change, and the most between equal computations."""
TWO = (700, 300)
"""Timesteps of two steps."""
A, B = Reference(random(1, 4, 16, 16, seed=1) * 4), Reference(random(1, 4, 12, 20, seed=2) * 4)
EDIT = Injection(AttentionEdit(shape_query=1.0), (B,), sites="all", shape=A)


def small(**changes: Any) -> Pipe:
    """A UNet of two levels with self-attention on the second and in the middle."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
        "cross_attention_dim": 128,
    }
    return pipeline(UNet2DConditionModel(**{**shape, **changes}).eval())


@pytest.fixture(scope="module")
def shared() -> Pipe:
    return small()


@pytest.fixture
def pipe(shared: Pipe) -> Iterator[Pipe]:
    """The small pipeline, of which every test must leave nothing behind."""
    before = state(shared)
    yield shared
    assert state(shared) == before


def state(pipe: Pipe) -> Any:
    """All that the host touches: processors by identity, hooks by number."""
    processors = {name: id(one) for name, one in pipe.unet.attn_processors.items()}
    hooks = [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in pipe.unet.modules()]
    return processors, hooks, list(pipe.unet.state_dict())


def injected(pipe: Pipe, *injections: Injection, run: Callable[[Pipe], Tensor] | None = None, **how: Any) -> Tensor:
    with attach(pipe, *injections, **how):
        return euler(pipe, TWO) if run is None else run(pipe)


def change(a: Tensor, b: Tensor) -> float:
    assert torch.isfinite(a).all()
    return float((a - b).abs().max())


@contextmanager
def evaluations(pipe: Pipe) -> Iterator[list[dict[str, Any]]]:
    """Every evaluation of the UNet, the references' included."""
    seen: list[dict[str, Any]] = []
    forward = pipe.unet.forward

    def record(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **told: Any) -> Any:
        seen.append({"sample": sample, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states, **told})
        return forward(sample, timestep, encoder_hidden_states, **told)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.unet, "forward", record)
        yield seen


def references_of(seen: list[dict[str, Any]], reference: Reference = B) -> list[dict[str, Any]]:
    return [one for one in seen if one["sample"].shape == reference.latent.shape]


# --- attached, neutral, detached --------------------------------------------------------------------------------------


def test_inside_the_block_pictures_change_and_after_it_all_is_as_before(pipe: Pipe) -> None:
    plain = euler(pipe, TWO)
    assert change(injected(pipe, EDIT), plain) > VISIBLE
    assert torch.equal(euler(pipe, TWO), plain)


def test_strength_zero_is_the_plain_model_bit_for_bit(pipe: Pipe) -> None:
    before = state(pipe)
    with attach(pipe, replace(EDIT, edit=AttentionEdit(strength=0.0))):
        assert state(pipe) == before
        found = euler(pipe, TWO)
    assert torch.equal(found, euler(pipe, TWO))


def test_a_failure_in_the_block_leaves_nothing_behind(pipe: Pipe) -> None:
    with pytest.raises(KeyboardInterrupt), attach(pipe, EDIT):
        euler(pipe, TWO)
        raise KeyboardInterrupt


def test_after_a_failure_inside_the_model_the_block_goes_on(pipe: Pipe) -> None:
    expected = injected(pipe, EDIT)
    layer = pipe.unet.up_blocks[-1].resnets[0]
    with attach(pipe, EDIT):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer, "forward", fail)
            with pytest.raises(MemoryError):
                euler(pipe, TWO)
        assert torch.equal(euler(pipe, TWO), expected)


def fail(*_: Any) -> Tensor:
    raise MemoryError


def test_a_block_within_a_block_is_refused_and_the_outer_one_goes_on(pipe: Pipe) -> None:
    expected = injected(pipe, EDIT)
    with attach(pipe, EDIT):
        with pytest.raises(HostError, match="single one"), attach(pipe, EDIT):
            pass
        assert torch.equal(euler(pipe, TWO), expected)


def test_a_processor_that_came_in_the_block_stays(pipe: Pipe) -> None:
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    before, mine = layer.processor, AttnProcessor()
    with attach(pipe, EDIT):
        euler(pipe, TWO)
        layer.set_processor(mine)
    assert layer.processor is mine
    layer.set_processor(before)


# --- other processors -------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Another package's processor: a module with a weight and a keyword of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.inner = AttnProcessor()
        self.calls: list[tuple[int, Any]] = []

    def forward(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **told: Any) -> Tensor:
        self.calls.append((hidden_states.shape[1], told.get("colour")))
        return self.inner(attn, hidden_states, encoder_hidden_states, told.get("attention_mask"))


class Plain:
    """A processor that is no module; diffusers reads from the signature what it takes."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        colour: str = "none",
    ) -> Tensor:
        self.seen.append(colour)
        return AttnProcessor()(attn, hidden_states, encoder_hidden_states, attention_mask)


@contextmanager
def processor_of_the_middle(pipe: Pipe, processor: Any) -> Iterator[None]:
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    before = layer.processor
    layer.set_processor(processor)
    try:
        yield
    finally:
        layer.set_processor(before)


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(2), Counting()])
def test_the_layers_own_processor_computes_the_edited_attention(pipe: Pipe, processor: Any) -> None:
    """With masks and biases too, which reach it as further channels of each head."""
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :9] = 1
    edits = [
        Injection(AttentionEdit("extend", reference_bias=0.5), (B, A), sites="middle", mask=mask),
        Injection(AttentionEdit(shape_query=1.0, temperature=1.5), (B,), sites="middle", shape=A, rows="positive"),
    ]
    expected = [injected(pipe, edit) for edit in edits]
    with processor_of_the_middle(pipe, processor):
        before = state(pipe)
        for edit, right in zip(edits, expected, strict=True):
            if isinstance(processor, Counting):
                processor.calls.clear()
            assert change(injected(pipe, edit), right) < ROUNDING
            assert state(pipe) == before
        if isinstance(processor, Counting):
            # Two steps: two references' passes (12x20 and 16x16 cells, halved), and the positive and negative rows.
            assert sorted(n for n, _ in processor.calls) == sorted(2 * [60, 64, 64, 64])


def test_a_processor_gets_its_own_keywords_where_nothing_is_edited(pipe: Pipe) -> None:
    processor = Plain()
    edit = replace(EDIT, sites="middle", window=Window(0.5, 1.0), shape=None)
    with processor_of_the_middle(pipe, processor), attach(pipe, edit, guided=False):
        for timestep in (900, 100):
            pipe.unet(NOISE[:1], timestep, POSITIVE[0][0], cross_attention_kwargs={"colour": "red"})
    # At 900 the plain call; at 100 the reference's pass, then the edited call, whose attention gets no keywords.
    assert processor.seen == ["red", "red", "none"]


def test_fused_projections_work_alike(pipe: Pipe) -> None:
    expected = injected(pipe, EDIT)
    fused = small()
    fused.unet.load_state_dict(pipe.unet.state_dict())
    fused.unet.fuse_qkv_projections()
    assert change(injected(fused, EDIT), expected) < ROUNDING


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guided", "edited"), [(True, [2, 3]), (False, [0, 1, 2, 3])])
def test_rows_are_negative_halves_first_if_guided(pipe: Pipe, guided: bool, edited: list[int]) -> None:
    told = NOISE.new_zeros(4, 4, 16, 16), 500, torch.cat([random(1, 32, 128, seed=i) for i in range(4)])
    plain = pipe.unet(*told).sample
    with attach(pipe, replace(EDIT, rows="positive"), guided=guided):
        found = pipe.unet(*told).sample
    changed = [i for i in range(4) if change(found[i], plain[i]) > VISIBLE]
    same = [i for i in range(4) if change(found[i], plain[i]) < ROUNDING]
    assert changed == edited
    assert same == [i for i in range(4) if i not in edited]


def test_the_pipeline_knows_whether_it_guides(pipe: Pipe) -> None:
    """With guidance the negative rows stay plain; without it all rows are positive, and all are edited."""
    edit = replace(EDIT, rows="positive")
    assert change(injected(pipe, edit), injected(pipe, EDIT)) > VISIBLE
    alone = [injected(pipe, one, run=lambda pipe: euler(pipe, TWO, cfg=1.0)) for one in (edit, EDIT)]
    assert torch.equal(*alone)


def test_a_batch_is_its_pictures_one_by_one(pipe: Pipe) -> None:
    batch = injected(pipe, EDIT, run=lambda pipe: euler(pipe, TWO, noise=NOISE))
    for i in range(3):
        alone = injected(pipe, EDIT, run=lambda pipe, i=i: euler(pipe, TWO, noise=NOISE[i : i + 1]))
        assert change(batch[i : i + 1], alone) < ROUNDING


# --- references -------------------------------------------------------------------------------------------------------


def test_references_of_any_size_on_pictures_of_any_size(pipe: Pipe) -> None:
    odd = Reference(random(1, 4, 13, 9, seed=3))
    noise = random(1, 4, 11, 19, seed=4)
    edit = replace(EDIT, appearance=(odd,), feature_strength=0.5)
    plain = euler(pipe, TWO, noise=noise)
    assert change(injected(pipe, edit, run=lambda pipe: euler(pipe, TWO, noise=noise)), plain) > VISIBLE


def test_the_reference_is_noised_for_the_model_at_its_timestep(pipe: Pipe) -> None:
    """By the scheduler's own rule, `sqrt(a) x + sqrt(1 - a) noise`, on latents scaled as the model knows them."""
    with evaluations(pipe) as seen:
        injected(pipe, EDIT)
    for timestep, one in zip(TWO, references_of(seen), strict=True):
        a = pipe.scheduler.alphas_cumprod[timestep].double()
        expected = a.sqrt() * (B.latent * 0.18215) + (1 - a).sqrt() * B.noise()
        assert float(one["timestep"]) == timestep
        assert torch.allclose(one["sample"], expected.float(), atol=1e-5)


def test_the_reference_sees_the_negative_prompt_the_only_one_or_its_own(pipe: Pipe) -> None:
    own = prompt(7)[0][0]
    told = replace(EDIT, shape=None, appearance=(replace_conditioning(B, Prompt(own)),))
    for edit, cfg, expected in (
        (EDIT, 3.0, NEGATIVE[0][0]),
        (EDIT, 1.0, POSITIVE[0][0]),
        (told, 3.0, own),
    ):
        with evaluations(pipe) as seen:
            injected(pipe, edit, run=lambda pipe, cfg=cfg: euler(pipe, TWO, cfg=cfg))
        passes = references_of(seen)
        assert len(passes) == 2
        assert all(torch.equal(one["encoder_hidden_states"], expected) for one in passes)


def replace_conditioning(reference: Reference, conditioning: Any) -> Reference:
    return Reference(reference.latent, conditioning=conditioning)


def test_sdxls_reference_has_its_own_size_unless_the_prompts_say_more() -> None:
    shape = {**FAMILIES["sdxl"][1], "layers_per_block": 1, "transformer_layers_per_block": 1}
    pipe = pipeline(UNet2DConditionModel(cross_attention_dim=128, **shape).eval())
    extra = [{"pooled_output": random(1, POOLED, seed=i)} for i in (1, 2)]

    def run(**sizes: Any) -> list[dict[str, Any]]:
        with evaluations(pipe) as seen, attach(pipe, EDIT):
            pipe(
                prompt_embeds=POSITIVE[0][0],
                negative_prompt_embeds=NEGATIVE[0][0],
                pooled_prompt_embeds=extra[0]["pooled_output"],
                negative_pooled_prompt_embeds=extra[1]["pooled_output"],
                num_inference_steps=1,
                height=128,
                width=128,
                output_type="latent",
                **sizes,
            )
        return references_of(seen)

    (one,) = run()
    assert one["added_cond_kwargs"]["time_ids"].tolist() == [[96, 160, 0, 0, 96, 160]]
    assert torch.equal(one["added_cond_kwargs"]["text_embeds"], extra[1]["pooled_output"])
    (one,) = run(negative_original_size=(512, 512), negative_target_size=(128, 128))
    assert one["added_cond_kwargs"]["time_ids"].tolist() == [[512, 512, 0, 0, 128, 128]]


def test_the_references_pass_goes_without_what_steers_the_layout(pipe: Pipe) -> None:
    residuals = {
        "down_block_additional_residuals": tuple(
            torch.ones(1, *shape) for shape in ((32, 16, 16), (32, 16, 16), (32, 8, 8), (64, 8, 8))
        ),
        "mid_block_additional_residual": torch.ones(1, 64, 8, 8),
    }
    told = NOISE[:1], 500, POSITIVE[0][0]
    with evaluations(pipe) as seen, attach(pipe, EDIT, guided=False):
        pipe.unet(*told, **residuals)
    assert len(seen) == 3
    assert [sum(name in one for name in residuals) for one in seen] == [0, 0, 2]


# --- the bank ---------------------------------------------------------------------------------------------------------


def test_a_reference_is_passed_once_a_noise_level_for_all_pictures_of_a_block(pipe: Pipe) -> None:
    with attach(pipe, EDIT) as report:
        first = euler(pipe, TWO)
        euler(pipe, TWO, noise=NOISE, positive=prompt(9))
        assert torch.equal(euler(pipe, TWO), first)
    assert (report.rows, report.reference_rows, report.hits) == (2 * (2 + 6 + 2), 4, 8)


def test_a_bank_serves_several_blocks(pipe: Pipe) -> None:
    bank = ReferenceBank(device_budget=0, ram_budget=1 << 30)
    first = injected(pipe, EDIT, bank=bank)
    with attach(pipe, EDIT, bank=bank) as report:
        assert torch.equal(euler(pipe, TWO), first)
    assert (report.reference_rows, report.hits) == (0, 4)


class Lora(nn.Linear):
    """What of peft's layers tells how strongly they act."""

    scaling = {"style": 1.0}
    active_adapters = ("style",)
    disable_adapters = False


def other_prompt(_: Pipe) -> dict[str, Any]:
    return {"negative": prompt(55)}


def other_noise_levels(_: Pipe) -> dict[str, Any]:
    return {"timesteps": (650, 250)}


def other_weights(pipe: Pipe) -> dict[str, Any]:
    pipe.unet.mid_block.resnets[0].conv1.weight *= 1.5
    return {}


def other_latents(pipe: Pipe) -> dict[str, Any]:
    pipe.vae.register_to_config(scaling_factor=0.5)
    return {}


def other_schedule(pipe: Pipe) -> dict[str, Any]:
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, beta_end=0.02)
    return {}


def other_lora_strength(pipe: Pipe) -> dict[str, Any]:
    layer = pipe.unet.mid_block.attentions[0].proj_in
    layer.scaling = {"style": 0.5}
    return {}


@pytest.mark.parametrize(
    "difference",
    [other_prompt, other_noise_levels, other_weights, other_latents, other_schedule, other_lora_strength],
)
def test_the_bank_is_asked_for_what_the_model_would_see_now(difference: Callable[[Pipe], dict[str, Any]]) -> None:
    """In one block even: whatever changes between two pictures, the second is as in a block of its own."""
    pipe = small(use_linear_projection=True)
    pipe.unet.mid_block.attentions[0].proj_in.__class__ = Lora
    with attach(pipe, EDIT) as report:
        euler(pipe, TWO)
        passes = report.reference_rows
        run = {"timesteps": TWO, **difference(pipe)}
        found = euler(pipe, **run)
    assert report.reference_rows == 2 * passes
    assert torch.equal(found, injected(pipe, EDIT, run=lambda pipe: euler(pipe, **run)))


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_says_what_happened(pipe: Pipe) -> None:
    edit = replace(EDIT, sites="decoder", feature_strength=0.5)
    with attach(pipe, edit) as report:
        euler(pipe, TWO)
    sites = [site.name for site in sites_of(pipe.unet) if site.part == "output"]
    assert report.chosen == sites
    assert report.calls == {**dict.fromkeys(sites, 2), "features": 2}
    assert all(report.change[site] > 0 for site in sites)
    assert report.bytes > 0
    assert report.seconds > report.reference_seconds > 0
    assert report.reading is not None
    assert report.reading.shape == (6, 10)


@pytest.mark.parametrize("run", [lambda pipe: None, lambda pipe: euler(pipe, (200,))])
def test_an_injection_that_never_acts_is_an_error(pipe: Pipe, run: Callable[[Pipe], Any]) -> None:
    edit = replace(EDIT, window=Window(0.0, 0.5), shape=None)
    with pytest.raises(HostError, match="changed nothing"), attach(pipe, edit):
        run(pipe)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_loop_of_ones_own_must_say_whether_it_guides() -> None:
    pipe = small()
    told = NOISE[:2], 500, POSITIVE[0][0].expand(2, -1, -1)
    with pytest.raises(HostError, match="guided=True"), attach(pipe, EDIT):
        pipe.unet(*told)
    with pytest.raises(HostError, match="3 rows"), attach(pipe, EDIT, guided=True):
        pipe.unet(NOISE, 500, POSITIVE[0][0].expand(3, -1, -1))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"timestep": torch.tensor([500, 400])}, "one noise level"),
        ({"timestep": -1.2}, "between 0 and 999"),
        ({"attention_mask": torch.ones(2, 256)}, "attention_mask"),
    ],
)
def test_evaluations_that_cannot_be_followed_are_refused(pipe: Pipe, told: dict[str, Any], message: str) -> None:
    call = {"timestep": 500, "encoder_hidden_states": POSITIVE[0][0].expand(2, -1, -1), **told}
    with pytest.raises(HostError, match=message), attach(pipe, EDIT, guided=False):
        pipe.unet(NOISE[:2], **call)


def test_a_scheduler_without_diffusion_noise_is_refused() -> None:
    pipe = small()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(HostError, match="FlowMatchEulerDiscreteScheduler"), attach(pipe, EDIT, guided=False):
        pipe.unet(NOISE[:1], 500, POSITIVE[0][0])


def test_perturbed_attention_guidance_is_refused(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(pipe), "do_perturbed_attention_guidance", True, raising=False)
    with pytest.raises(HostError, match="pag_scale"):
        injected(pipe, EDIT)


def test_merged_tokens_are_refused_by_the_place(pipe: Pipe) -> None:
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    merging = layer.register_forward_pre_hook(lambda _, args: (args[0][:, ::2], *args[1:]))
    try:
        with pytest.raises(HostError, match=r"middle\.0\.0 30 tokens .* 6 x 10"):
            injected(pipe, EDIT)
    finally:
        merging.remove()


def test_models_of_other_kinds_are_refused() -> None:
    pipe = small()
    unet, compiled = pipe.unet, small()
    compiled.unet.mid_block.compile(backend="eager")
    other = small(mid_block_type="UNetMidBlock2DSimpleCrossAttn")
    blind = small(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    pipe.unet = nn.Identity()
    refused = [(pipe, "Identity"), (compiled, "compiled"), (small(in_channels=9), "inpainting")]
    for one, message in [*refused, (other, "SimpleCrossAttn"), (blind, "decoder")]:
        with pytest.raises(HostError, match=message), attach(one, EDIT):
            pass
    pipe.unet = unet


def test_references_of_other_kinds_are_refused(pipe: Pipe) -> None:
    wide = Reference(torch.zeros(1, 16, 8, 8))
    with pytest.raises(HostError, match="16 latent channels"), attach(pipe, replace(EDIT, appearance=(wide,))):
        pass
    comfys = replace(EDIT, appearance=(replace_conditioning(B, POSITIVE),))
    with pytest.raises(HostError, match="Prompt"):
        injected(pipe, comfys)
    with pytest.raises(ValueError, match="without its negative"):
        Prompt(torch.zeros(2, 32, 128))


def test_sites_that_the_model_lacks_are_refused_on_entry(pipe: Pipe) -> None:
    with pytest.raises(ValueError, match=r"output\.0"), attach(pipe, replace(EDIT, sites="output.7")):
        pass


# --- a whole pipeline -------------------------------------------------------------------------------------------------


def test_from_words_and_pictures_to_a_picture() -> None:
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER_FOLDER)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=32, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    unet = small().unet
    pipe = pipeline(unet, text_encoder=CLIPTextModel(config).eval(), tokenizer=tokenizer)
    seeds = itertools.count()

    def encode(height: int, width: int) -> Reference:
        pixels = pipe.image_processor.preprocess(random(3, height, width, seed=next(seeds)).sigmoid())
        return Reference(pipe.vae.encode(pixels).latent_dist.mode().float().cpu())

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        made = pipe("red square", num_inference_steps=3, height=64, width=96, generator=generator, output_type="pt")
        return made.images

    plain = draw()
    with attach(pipe, *PRESETS["default"].injections([encode(64, 64)], encode(80, 64))) as report:
        found = draw()
    assert found.shape == (1, 3, 64, 96)
    assert change(found, plain) > VISIBLE
    assert report.reference_rows == 3 + 3  # both are read at every step
    assert torch.equal(draw(), plain)
