"""One self-attention of ComfyUI's UNet, edited by the host, against the materialised float64 formulas.

What the layer gives is taken before its output projection. What goes in is found without the pack's host: the layer's
own input by another pack's patch, the references' by running the UNet itself on the noised reference.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inversion_core.attention import AttentionEdit, ReferenceTokens, Tokens
from inversion_core.hosts.comfy_unet import attach, last_report
from inversion_core.injection import Injection
from inversion_core.reference import Reference

from ..core import reference_attention as oracle
from .models import NEGATIVE, NOISE, Patcher, demo_patcher, random, sample

SITE = "output.3.0"
NUMBER = 3
TOLERANCE = 1e-4
"""Of values of about 1: float32 through two projections and a softmax, a hundred times its rounding."""

TALL = Reference(random(1, 4, 18, 8, seed=5), strength=0.5)
WIDE = Reference(random(1, 4, 8, 20, seed=6), strength=2.0)
SHAPE = Reference(random(1, 4, 16, 16, seed=7))
MASK = (random(1, 1, 16, 16, seed=8) > 0).float()


@pytest.fixture(scope="module")
def model() -> Patcher:
    return demo_patcher()


def layer_of(model: Patcher) -> Any:
    return model.model.diffusion_model.output_blocks[NUMBER][1].transformer_blocks[0].attn1


def recorder(found: list[Tensor]) -> Any:
    def patch(n: Tensor, context: Tensor, value: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
        if extra["block"] == ("output", NUMBER):
            found.append(n.clone())
        return n, context, value

    return patch


def seen(model: Patcher, reference: Reference) -> Tensor:
    """What enters the layer when the UNet looks at the reference at the first noise level: (1, M, C)."""
    found: list[Tensor] = []
    base = model.model
    sigma = base.model_sampling.sigma_max.reshape(1)
    noisy = base.model_sampling.noise_scaling(sigma, reference.noise(), base.process_latent_in(reference.latent))
    base.diffusion_model(
        base.model_sampling.calculate_input(sigma, noisy),
        base.model_sampling.timestep(sigma).float(),
        context=NEGATIVE[0][0],
        transformer_options={"patches": {"attn1_patch": [recorder(found)]}},
    )
    (only,) = found
    return only


def edited(model: Patcher, *injections: Injection) -> tuple[Tensor, Tensor]:
    """What other packs see enter the layer, and what its attention gives: (2, N, C) each, in the first step."""
    entered: list[Tensor] = []
    left: list[Tensor] = []
    patched = attach(model, *injections)
    patched.set_model_attn1_patch(recorder(entered))

    def record(_: Any, args: tuple) -> None:
        if args[0].shape[0] == 2:  # the references' passes have one row
            left.append(args[0].clone())

    handle = layer_of(model).to_out.register_forward_pre_hook(record)
    try:
        sample(patched, noise=NOISE[:1], steps=1)
    finally:
        handle.remove()
    assert list(last_report(patched).calls) == [SITE]
    return entered[0], left[0]


def entering(model: Patcher) -> Tensor:
    """What enters the layer of the untouched model in the same step."""
    found: list[Tensor] = []
    plain = model.clone()
    plain.set_model_attn1_patch(recorder(found))
    sample(plain, noise=NOISE[:1], steps=1)
    return found[0]


def project(model: Patcher, n: Tensor, values: Tensor | None = None) -> Tokens:
    layer = layer_of(model)
    q, k, v = layer.to_q(n), layer.to_k(n), layer.to_v(n if values is None else values)
    return Tokens(*(x.unflatten(2, (layer.heads, -1)).transpose(1, 2) for x in (q, k, v)))


def references_of(model: Patcher, references: Sequence[Reference]) -> list[ReferenceTokens]:
    found = []
    for one in references:
        tokens = project(model, seen(model, one))
        found.append(ReferenceTokens(tokens.k, tokens.v, strength=one.strength, q=tokens.q))
    return found


def assert_equals(actual: Tensor, expected: np.ndarray) -> None:
    joined = expected.transpose(0, 2, 1, 3).reshape(*actual.shape)
    np.testing.assert_allclose(oracle.array(actual), joined, rtol=0, atol=TOLERANCE * max(1.0, np.abs(joined).max()))


EDITS = {
    "replace": AttentionEdit(),
    "extend": AttentionEdit("extend", reference_bias=math.log(2)),
    "extend with statistics": AttentionEdit("extend", qk_stats=True, reference_bias=math.log(2)),
    "statistics alone": AttentionEdit("none", qk_stats=True),
    "sharper": AttentionEdit(temperature=1.5),
    "contrast": AttentionEdit(contrast=1.67),
    "linear contrast": AttentionEdit("extend", contrast=3.0, contrast_form="linear"),
    "half": AttentionEdit("extend", strength=0.5),
    "shape query": AttentionEdit(shape_query=0.75),
    "shape query and key": AttentionEdit("extend", shape_query=1.0, shape_key=0.6),
    "shape alone": AttentionEdit("none", shape_query=1.0, shape_key=1.0),
}


@pytest.mark.parametrize("mask", [None, MASK], ids=["everywhere", "masked"])
@pytest.mark.parametrize("name", EDITS)
def test_the_layer_gives_what_the_formulas_say(model: Patcher, name: str, mask: Tensor | None) -> None:
    """Two references of unequal sizes and strengths; a shape reference of the output's size."""
    edit, appearance = EDITS[name], (TALL, WIDE)
    shaped = edit.shape_query > 0 or edit.shape_key > 0
    shape = SHAPE if shaped else None
    injection = Injection(edit, appearance, sites=SITE, shape=shape, feature_strength=0.0, mask=mask)
    n, out = edited(model, injection)

    expected = oracle.edited_attention(
        edit,
        project(model, n),
        references_of(model, appearance),
        project(model, seen(model, SHAPE)) if shaped else None,
        None if mask is None else mask.flatten(1),
    )
    assert_equals(out, expected)


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("mask", [None, MASK], ids=["everywhere", "masked"])
def test_normalise_changes_what_enters_the_layer_as_the_formulas_say(
    model: Patcher, mask: Tensor | None, strength: float
) -> None:
    """Two references of unequal strengths: the weaker one's tokens are read less, in the proportion of the two."""
    edit = AttentionEdit("normalise", strength=strength)
    entered, out = edited(model, Injection(edit, (TALL, WIDE), sites=SITE, mask=mask))
    n = entering(model)

    tokens = [seen(model, one) for one in (TALL, WIDE)]
    share = torch.cat(
        [torch.full(x.shape[:2], one.strength / 2.0) for one, x in zip((TALL, WIDE), tokens, strict=True)], 1
    )
    reference = torch.cat(tokens, dim=1)
    layer = layer_of(model)
    q = layer.to_q(standardised(n)).unflatten(2, (layer.heads, -1)).transpose(1, 2)
    k = layer.to_k(standardised(reference)).unflatten(2, (layer.heads, -1)).transpose(1, 2)
    hidden = oracle.attention_weighted_adain(
        n, reference, q, k, share, None if mask is None else mask.flatten(1), strength
    )
    np.testing.assert_allclose(oracle.array(entered), hidden, rtol=0, atol=TOLERANCE * np.abs(hidden).max())
    own = project(model, torch.from_numpy(hidden).float())
    assert_equals(out, oracle.edited_attention(AttentionEdit("none"), own))


def standardised(x: Tensor) -> Tensor:
    """Each channel over the tokens, in float64."""
    wide = x.double()
    return ((wide - wide.mean(1, keepdim=True)) / wide.std(1, unbiased=False, keepdim=True)).to(x.dtype)


def test_only_the_positive_row_where_that_is_asked_for(model: Patcher) -> None:
    n, out = edited(model, Injection(AttentionEdit(), (WIDE,), sites=SITE, rows="positive"))
    plain = oracle.edited_attention(AttentionEdit("none"), project(model, n))
    changed = oracle.edited_attention(AttentionEdit(), project(model, n), references_of(model, (WIDE,)))
    assert_equals(out, np.stack((plain[0], changed[1])))  # ComfyUI puts the negative row first


def test_a_reference_of_hardly_any_strength_hardly_counts(model: Patcher) -> None:
    """Its share of a query's attention is at most `s * M_weak / M_strong * exp(range of the logits)`, and moves the
    result by at most that share of twice the largest value."""
    strength = 1e-7
    weak = Reference(WIDE.latent, strength=strength)
    n, alone = edited(model, Injection(AttentionEdit(), (SHAPE,), sites=SITE))
    _, both = edited(model, Injection(AttentionEdit(), (SHAPE, weak), sites=SITE))
    _, equal = edited(model, Injection(AttentionEdit(), (SHAPE, Reference(WIDE.latent)), sites=SITE))

    first, second = references_of(model, (SHAPE, weak))
    q, k = project(model, n).q, torch.cat((first.k, second.k), dim=2)
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    largest = torch.cat((first.v, second.v), dim=2).abs().max()
    ratio = second.k.shape[2] / first.k.shape[2]
    bound = float(strength * ratio * (logits.max() - logits.min()).exp() * 2 * largest)
    assert float((equal - alone).abs().max()) > 10 * bound  # or the bound would say nothing
    assert float((both - alone).abs().max()) < bound + TOLERANCE


def test_the_mask_of_one_reference_leaves_the_other_alone(model: Patcher) -> None:
    """Only the left half of the first may be read: it is as if its right half were not there."""
    mask = torch.cat((torch.ones(1, 1, 16, 8), torch.zeros(1, 1, 16, 8)), dim=3)
    masked = Reference(SHAPE.latent, mask=mask)
    n, out = edited(model, Injection(AttentionEdit(), (masked, WIDE), sites=SITE))
    first, second = references_of(model, (SHAPE, WIDE))
    half = ReferenceTokens(first.k, first.v, mask.flatten(1))
    assert_equals(out, oracle.edited_attention(AttentionEdit(), project(model, n), [half, second]))
