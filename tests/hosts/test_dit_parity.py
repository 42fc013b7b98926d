"""Flux and SD3 in diffusers, against the same weights in ComfyUI: each by its own host, and diffusers by hand besides.

diffusers lays the tokens of SD3 out the other way round, projects queries, keys and values apart, and knows nothing of
this pack. By hand means: its attention is exchanged here by what `replace` and `extend` are, written down once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.samplers
import comfy.utils
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from inversion_core.attention import AttentionEdit
from inversion_core.hosts import diffusers_dit
from inversion_core.hosts.base import HostError
from inversion_core.hosts.comfy_injection import attach, sites_of
from inversion_core.hosts.diffusers_dit import FlowLevels, Prompt
from inversion_core.injection import Injection, Window
from inversion_core.presets import PRESETS
from inversion_core.reference import Reference

from .dit_models import KINDS, TEXT, WIDTH
from .models import Patcher, random, sample

REFERENCE = Reference(random(1, 16, 10, 14, seed=2))
STEPS, GUIDANCE = 2, 3.5


class Flux:
    """Its tokens: the prompt, the picture. Sites count on from the double blocks to the single ones."""

    name = "flux"
    latents = {"shift_factor": 0.1159, "scaling_factor": 0.3611}
    schedule = {"shift": math.exp(1.15)}
    chosen = {"all": range(5), "single": range(2, 5), "double.1": (1,)}

    def __init__(self, weights: dict[str, Tensor]) -> None:
        shape: dict[str, Any] = {"num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16}
        self.model = FluxTransformer2DModel(
            **shape,
            patch_size=1,
            in_channels=64,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
        names = comfy.utils.flux_to_diffusers({"depth": 2, "depth_single_blocks": 3, "hidden_size": 32})
        self.model.load_state_dict(converted(names, weights))

    def velocity(self, x: Tensor, sigma: float, prompt: list) -> Tensor:
        b, c, h, w = x.shape
        packed = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * 4)
        places = torch.zeros(h // 2, w // 2, 3)
        places[..., 1] = torch.arange(h // 2)[:, None]
        places[..., 2] = torch.arange(w // 2)
        out = self.model(
            hidden_states=packed,
            encoder_hidden_states=prompt[0][0].expand(b, -1, -1),
            pooled_projections=prompt[0][1]["pooled_output"].expand(b, -1),
            timestep=torch.full((b,), sigma),
            guidance=torch.full((b,), GUIDANCE),
            img_ids=places.flatten(0, 1),
            txt_ids=torch.zeros(TEXT, 3),
            return_dict=False,
        )[0]
        return out.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)

    @staticmethod
    def picture(call: int, tokens: int) -> slice:
        return slice(TEXT, None)

    def pipeline(self, vae: Any, scheduler: Any) -> Any:
        return FluxPipeline(scheduler, vae, None, None, None, None, self.model)  # pyright: ignore[reportArgumentType]


class SD3:
    """Its tokens: the picture, the prompt. The first two blocks attend twice, the second time the picture alone."""

    name = "sd3"
    latents = {"shift_factor": 0.0609, "scaling_factor": 1.5305}
    schedule = {"shift": 3.0}
    chosen = {"all": range(6), "double.1": (2, 3), "late": (5,)}

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.model = SD3Transformer2DModel(
            sample_size=24,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=4,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=128,
            pooled_projection_dim=16,
            pos_embed_max_size=24,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        )
        names = comfy.utils.mmdit_to_diffusers({"depth": 2, "num_blocks": 4})
        for end in ("weight", "bias"):
            # ComfyUI's table takes the width for the number of blocks, and so another block for the last one.
            second, last = (f"transformer_blocks.{i}.norm1_context.linear.{end}" for i in (1, 3))
            names[last] = (f"joint_blocks.3.context_block.adaLN_modulation.1.{end}", None, names[second][2])
            names[second] = f"joint_blocks.1.context_block.adaLN_modulation.1.{end}"
        self.model.load_state_dict(converted(names, weights))

    def velocity(self, x: Tensor, sigma: float, prompt: list) -> Tensor:
        b = x.shape[0]
        return self.model(
            hidden_states=x,
            encoder_hidden_states=prompt[0][0].expand(b, -1, -1),
            pooled_projections=prompt[0][1]["pooled_output"].expand(b, -1),
            timestep=torch.full((b,), sigma * 1000),
            return_dict=False,
        )[0]

    @staticmethod
    def picture(call: int, tokens: int) -> slice:
        return slice(None) if call in (1, 3) else slice(0, tokens - TEXT)

    def pipeline(self, vae: Any, scheduler: Any) -> Any:
        encoders: Any = (None,) * 6
        return StableDiffusion3Pipeline(self.model, scheduler, vae, *encoders)


def converted(names: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI's weights under diffusers' names: ComfyUI's own table, read backwards."""
    found = {}
    for name, source in names.items():
        key, part, change = (*source, None, None)[:3] if isinstance(source, tuple) else (source, None, None)
        if key in weights:
            value = weights[key] if part is None else weights[key].narrow(*part)
            found[name] = value if change is None else change(value)  # exchanging halves is its own inverse
    return found


class Studio:
    """One set of weights in both."""

    def __init__(self, kind: Any) -> None:
        self.asked = KINDS[kind.name]
        self.comfy: Patcher = self.asked.build()
        self.base = self.comfy.model
        self.theirs = kind(dict(self.base.diffusion_model.state_dict()))
        self.theirs.model.eval()
        self.prompt, self.negative = self.asked.prompt(101), self.asked.prompt(102)
        self.noise = self.asked.noise(2)
        levels: Any = {
            "block_out_channels": (8,) * 4,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
        }
        vae = AutoencoderKL(norm_num_groups=4, latent_channels=16, **levels, **self.theirs.latents)
        self.pipe = self.theirs.pipeline(vae, FlowMatchEulerDiscreteScheduler(**self.theirs.schedule))
        self.pipe.set_progress_bar_config(disable=True)

    def told(self, prompt: list) -> dict[str, Tensor]:
        """A prompt for the pipeline."""
        return {"prompt_embeds": prompt[0][0], "pooled_prompt_embeds": prompt[0][1]["pooled_output"]}

    def drawn(self, pipe: Any = None, **changes: Any) -> Tensor:
        """What diffusers' own pipeline makes, as latents."""
        asked: dict[str, Any] = {
            **self.told(self.prompt),
            "height": 96,
            "width": 128,
            "num_inference_steps": 3,
            "generator": torch.Generator().manual_seed(3),
            "output_type": "latent",
            **changes,
        }
        if isinstance(self.theirs, SD3):
            negative = {f"negative_{name}": value for name, value in self.told(self.negative).items()}
            asked = {**negative, **asked}
        return (pipe or self.pipe)(**asked).images

    def hosted(self, *injections: Injection) -> Tensor:
        """Euler's steps along diffusers' velocities, edited by the diffusers host.

        The references see the negative prompt, as ComfyUI gives it to them.
        """
        seen = Prompt(self.negative[0][0], {"pooled_projections": self.negative[0][1]["pooled_output"]})

        def here(one: Reference | None) -> Any:
            return None if one is None else replace(one, conditioning=seen)

        told = [replace(one, appearance=tuple(map(here, one.appearance)), shape=here(one.shape)) for one in injections]
        sigmas = self.sigmas()
        x = self.noise * sigmas[0]
        with diffusers_dit.attach(self.pipe, *told, guided=False):
            for now, after in zip(sigmas, sigmas[1:], strict=False):
                x = x + (after - now) * self.theirs.velocity(x, now, self.prompt)
        return x

    def sigmas(self) -> list[float]:
        return comfy.samplers.calculate_sigmas(self.base.model_sampling, "normal", STEPS).tolist()

    def ours(self, *injections: Injection) -> Tensor:
        model = attach(self.comfy, *injections) if injections else self.comfy
        out = sample(model, noise=self.noise, steps=STEPS, cfg=1.0, positive=self.prompt, negative=self.negative)
        return self.base.process_latent_in(out)

    def by_hand(self, edit: AttentionEdit | None, sites: Any) -> Tensor:
        """Euler's steps along diffusers' velocities."""
        sigmas = self.sigmas()
        x = self.noise * sigmas[0]
        clean = self.base.process_latent_in(REFERENCE.latent)
        for now, after in zip(sigmas, sigmas[1:], strict=False):
            seen: list[tuple[Tensor, Tensor]] = []
            if edit is not None:
                with attention_by(partial(self._remember, seen)):
                    self.theirs.velocity(now * REFERENCE.noise() + (1 - now) * clean, now, self.negative)
            with attention_by(partial(self._edited, edit, sites, seen)):
                x = x + (after - now) * self.theirs.velocity(x, now, self.prompt)
        return x

    def _remember(self, seen: list, i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = self.theirs.picture(i, k.shape[2])
        seen.append((k[:, :, place], v[:, :, place]))
        return PLAIN(q, k, v)

    def _edited(self, edit: AttentionEdit | None, sites: Any, seen: list, i: int, *qkv: Tensor) -> Tensor:
        q, k, v = qkv
        out = PLAIN(q, k, v)
        if edit is None or i not in sites:
            return out
        place = self.theirs.picture(i, k.shape[2])
        kept = torch.ones(k.shape[2], dtype=torch.bool)
        kept[place] = edit.reference == "extend"
        ref_k, ref_v = (one.expand(k.shape[0], -1, -1, -1) for one in seen[i])
        keys, values = torch.cat((k[:, :, kept], ref_k), dim=2), torch.cat((v[:, :, kept], ref_v), dim=2)
        bias = torch.zeros(1, keys.shape[2])
        bias[:, int(kept.sum()) :] = edit.reference_bias
        out = out.clone()
        out[:, :, place] = PLAIN(q[:, :, place], keys, values, attn_mask=bias)
        return out


PLAIN = F.scaled_dot_product_attention


@contextmanager
def attention_by(taker: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Every attention of diffusers, numbered as it comes, goes to `taker`."""
    calls = 0

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return taker(calls - 1, query, key, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        yield


@pytest.fixture(scope="module", params=[Flux, SD3], ids=lambda kind: kind.name)
def studio(request: pytest.FixtureRequest) -> Studio:
    with torch.inference_mode():
        return Studio(request.param)


CLOSE: dict[str, Any] = {"atol": 1e-3, "rtol": 1e-3}
"""Of latents of a deviation of about 5: rounding of two models that compute in another order, over all blocks."""


def test_the_untouched_models_are_the_same(studio: Studio) -> None:
    torch.testing.assert_close(studio.ours(), studio.by_hand(None, ()), **CLOSE)


@pytest.mark.parametrize(
    "edit", [AttentionEdit(), AttentionEdit("extend", reference_bias=0.7)], ids=lambda edit: edit.reference
)
def test_edited_alike_they_stay_the_same(studio: Studio, edit: AttentionEdit) -> None:
    plain = studio.ours()
    for rules, sites in studio.theirs.chosen.items():
        ours = studio.ours(Injection(edit, (REFERENCE,), sites=rules, positions="shared"))
        torch.testing.assert_close(ours, studio.by_hand(edit, sites), **CLOSE)
        assert (ours - plain).abs().max() > 50 * CLOSE["atol"]


SHAPE = Reference(random(1, 16, 12, 16, seed=1))
HALF = torch.cat((torch.ones(1, 1, 12, 8), torch.zeros(1, 1, 12, 8)), dim=3)
EDITS = {
    "own": Injection(AttentionEdit(), (REFERENCE,), sites="all"),
    "shared": Injection(AttentionEdit(), (REFERENCE,), sites="appearance", positions="shared"),
    "extend": Injection(AttentionEdit("extend", reference_bias=0.7, strength=0.8), (REFERENCE,), sites="all"),
    "statistics": Injection(AttentionEdit("extend", qk_stats=True), (REFERENCE,), sites="double"),
    "shape": Injection(AttentionEdit(shape_query=1.0), (REFERENCE,), sites="all", shape=SHAPE),
    "masked": Injection(
        AttentionEdit(), (replace(REFERENCE, mask=torch.ones(1, 1, 10, 14).tril()), SHAPE), sites="all", mask=HALF
    ),
    "window": Injection(AttentionEdit(), (REFERENCE,), window=Window(0.0, 0.5), sites="all"),
}


@pytest.mark.parametrize("name", EDITS)
def test_both_hosts_make_the_same_picture(studio: Studio, name: str) -> None:
    ours = studio.ours(EDITS[name])
    torch.testing.assert_close(ours, studio.hosted(EDITS[name]), **CLOSE)
    assert (ours - studio.ours()).abs().max() > 50 * CLOSE["atol"]


def test_presets_are_the_same_in_both(studio: Studio) -> None:
    for name in ("default", "style-aligned"):
        edits = PRESETS[name].injections([REFERENCE], SHAPE, transformer=True)
        torch.testing.assert_close(studio.ours(*edits), studio.hosted(*edits), **CLOSE)


def test_sites_and_noise_levels_are_named_alike(studio: Studio) -> None:
    assert diffusers_dit.sites_of(studio.theirs.model) == sites_of(studio.comfy)
    levels, sampling = FlowLevels.of(studio.pipe.scheduler, 48), studio.base.model_sampling
    for percent in (0.1, 0.5, 0.9):
        assert levels.percent_to_sigma(percent) == pytest.approx(float(sampling.percent_to_sigma(percent)), rel=1e-5)


def test_dynamic_shifting_is_as_the_pipeline_sets_it() -> None:
    """The scheduler's own sigmas, for Flux's configuration and another one."""
    for kind in ("exponential", "linear"):
        scheduler: Any = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, time_shift_type=kind
        )
        for tokens in (256, 1000, 4096):
            mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
            scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
            levels = FlowLevels.of(scheduler, tokens)
            found = [levels.percent_to_sigma(percent) for percent in (0.25, 0.5, 0.75)]
            assert found == pytest.approx([float(sigma) for sigma in scheduler.sigmas][1:4], rel=1e-5)


def test_pipelines_are_edited_inside_the_block_alone(studio: Studio) -> None:
    """Strength 0 and after the block: bit for bit the plain pipeline, with its own processors."""
    plain = studio.drawn()
    processors = [block.attn.processor for block in studio.theirs.model.transformer_blocks]
    edit = EDITS["shape"]
    with diffusers_dit.attach(studio.pipe, replace(edit, edit=replace(edit.edit, strength=0.0))):
        assert torch.equal(studio.drawn(), plain)
    with diffusers_dit.attach(studio.pipe, edit) as report:
        edited = studio.drawn()
        assert torch.equal(studio.drawn(), edited)
    assert (edited - plain).abs().max() > 0.1
    assert set(report.calls.values()) == {6}
    assert report.reference_rows == 6 and report.hits == 6  # two references, three steps; the second run finds all
    assert torch.equal(studio.drawn(), plain)
    assert processors == [block.attn.processor for block in studio.theirs.model.transformer_blocks]


def test_guided_batches_are_negative_then_positive(studio: Studio) -> None:
    """Editing the positive rows alone is something else than editing all; Flux's pipelines have no others."""
    made = []
    for rows in ("all", "positive"):
        with diffusers_dit.attach(studio.pipe, replace(EDITS["own"], rows=rows)):
            made.append(studio.drawn())
    assert torch.equal(*made) == isinstance(studio.theirs, Flux)


def test_a_picture_that_kontext_is_given_is_not_mistaken_for_the_output() -> None:
    """Its tokens come last; only as many queries are edited as the output has."""
    with torch.inference_mode():
        studio = Studio(Flux)
        parts = {name: studio.pipe.components[name] for name in ("scheduler", "vae", "transformer")}
        encoders: Any = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        pipe = FluxKontextPipeline(**parts, **encoders)
        pipe.set_progress_bar_config(disable=True)
        asked = {"image": random(1, 16, 12, 16, seed=7), "_auto_resize": False, "max_area": 96 * 128}
        plain = studio.drawn(pipe, **asked)
        with diffusers_dit.attach(pipe, EDITS["own"]) as report:
            edited = studio.drawn(pipe, **asked)
    assert (edited - plain).abs().max() > 0.1
    assert set(report.calls) == {site.name for site in sites_of(studio.comfy)}


def test_what_cannot_be_done_is_said(studio: Studio) -> None:
    edit, pipe = EDITS["own"], studio.pipe
    with (
        pytest.raises(HostError, match="changed nothing"),
        diffusers_dit.attach(pipe, edit),
        pytest.raises(HostError, match="give all injections to a single one"),
        diffusers_dit.attach(pipe, edit),
    ):
        pass
    with (
        pytest.raises(HostError, match="'normalise'"),
        diffusers_dit.attach(pipe, replace(edit, edit=AttentionEdit("normalise"))),
    ):
        pass
    with (
        pytest.raises(HostError, match="4 latent channels"),
        diffusers_dit.attach(pipe, Injection(AttentionEdit(), (Reference(random(1, 4, 8, 8, seed=1)),), sites="all")),
    ):
        pass
    with pytest.raises(HostError, match="no scheduler of flow matching"):
        FlowLevels.of(DDIMScheduler(), 48)
    if isinstance(studio.theirs, Flux):
        with (
            pytest.raises(HostError, match=r"10 x 14 cells.*12 x 16.*resize"),
            diffusers_dit.attach(pipe, replace(edit, shape=REFERENCE, edit=AttentionEdit(shape_query=1.0))),
        ):
            studio.drawn()
    else:
        with (
            pytest.raises(HostError, match="1 rows.*guided=False"),
            diffusers_dit.attach(pipe, edit, guided=True),
        ):
            studio.theirs.velocity(studio.noise[:1], 0.5, studio.prompt)
