"""Flux and SD3 edited by hand inside diffusers, against the same weights edited by us inside ComfyUI.

diffusers lays the tokens of SD3 out the other way round, projects queries, keys and values apart, and knows nothing of
this pack: its attention is exchanged here by what `replace` and `extend` mean, written down once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.samplers
import comfy.utils
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor

from inversion_core.attention import AttentionEdit
from inversion_core.hosts.comfy_injection import attach
from inversion_core.injection import Injection
from inversion_core.reference import Reference

from .dit_models import KINDS, TEXT, WIDTH
from .models import Patcher, random, sample

REFERENCE = Reference(random(1, 16, 10, 14, seed=2))
STEPS, GUIDANCE = 2, 3.5


class Flux:
    """Its tokens: the prompt, the picture. Sites count on from the double blocks to the single ones."""

    name, guided = "flux", True
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


class SD3:
    """Its tokens: the picture, the prompt. The first two blocks attend twice, the second time the picture alone."""

    name = "sd3"
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

    def ours(self, *injections: Injection) -> Tensor:
        model = attach(self.comfy, *injections) if injections else self.comfy
        out = sample(model, noise=self.noise, steps=STEPS, cfg=1.0, positive=self.prompt, negative=self.negative)
        return self.base.process_latent_in(out)

    def by_hand(self, edit: AttentionEdit | None, sites: Any) -> Tensor:
        """Euler's steps along diffusers' velocities."""
        sigmas = comfy.samplers.calculate_sigmas(self.base.model_sampling, "normal", STEPS).tolist()
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
