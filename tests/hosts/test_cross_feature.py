"""Cross-Feature Attention in ComfyUI's UNets: what features say is what is read."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inversion_core.attention import AttentionEdit
from inversion_core.correspondence import Correspondence, Matching
from inversion_core.features import Features
from inversion_core.hosts.comfy_injection import attach as attach_any
from inversion_core.hosts.comfy_unet import attach, last_report
from inversion_core.injection import Injection, Refresh
from inversion_core.reference import Reference

from .dit_models import KINDS
from .models import NOISE, Patcher, demo_patcher, random, sample, with_low_memory, with_record_of_site
from .test_comfy_unet_company import at_the_fine_site, at_the_fine_site_only, hypertile
from .test_comfy_unet_oracle import MASK, SHAPE, SITE, TALL, WIDE, assert_equals, edited, oracle, project, seen

MATCHED = AttentionEdit("none", matched=1.0)
GRIDS = {TALL: (18, 8), WIDE: (8, 20), SHAPE: (16, 16)}
"""Grids of the references at the site, which has one token for each cell of the latent."""
FEATURES = {TALL: (9, 4), WIDE: (5, 12)}
"""Grids of their features: others than the site's."""


def looks(grid: tuple[int, int], seed: int) -> Features:
    tokens = random(1, grid[0] * grid[1], 12, seed=seed)
    return Features(grid, tokens, tokens, tokens[:, None], None, None, None, f"{grid} {seed}")


def pair(reference: Reference, top_k: int = 5) -> Correspondence:
    return Correspondence(looks((7, 7), 1), looks(FEATURES[reference], 2), Matching(top_k=top_k))


def injection(edit: AttentionEdit = MATCHED, *references: Reference, **changes: Any) -> Injection:
    references = references or (WIDE,)
    made = Injection(edit, references, sites=SITE, feature_strength=0.0, matches=tuple(map(pair, references)))
    return replace(made, **changes)


@pytest.fixture(scope="module")
def model() -> Patcher:
    return demo_patcher()


def read(model: Patcher, *references: Reference) -> np.ndarray:
    """What the tokens read by the maps, written out in full: (1, H, N, D), float64."""
    total, strengths = 0.0, sum(one.strength for one in references)
    for one in references:
        found = pair(one).at((16, 16), GRIDS[one])
        whole = torch.zeros(256, GRIDS[one][0] * GRIDS[one][1], dtype=torch.float64)
        whole.scatter_add_(1, found.index, found.weight.double())
        values = project(model, seen(model, one)).v.double()
        total = total + (whole @ values) * (one.strength / strengths)
    return np.asarray(total)


@pytest.mark.parametrize("mask", [None, MASK], ids=["everywhere", "masked"])
@pytest.mark.parametrize("references", [(WIDE,), (TALL, WIDE)], ids=["one", "two"])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_the_layer_gives_what_the_maps_say(
    model: Patcher, strength: float, references: tuple[Reference, ...], mask: Tensor | None
) -> None:
    n, out = edited(model, injection(replace(MATCHED, strength=strength), *references, mask=mask))
    plain = oracle.edited_attention(AttentionEdit("none"), project(model, n))
    share = strength * (1.0 if mask is None else mask.flatten().double().numpy()[:, None])
    assert_equals(out, plain + share * (read(model, *references) - plain))


def test_the_rest_is_asked_by_queries(model: Patcher) -> None:
    """With `replace` it is Cross-Image Attention that the reading is mixed with."""
    n, out = edited(model, injection(AttentionEdit("replace", matched=0.3)))
    own, tokens = project(model, n), project(model, seen(model, WIDE))
    asked = oracle.edited_attention(AttentionEdit("none"), own._replace(k=tokens.k, v=tokens.v))
    assert_equals(out, asked + 0.3 * (read(model, WIDE) - asked))


def test_around_the_shapes_object_the_layout_alone_is_kept(model: Patcher) -> None:
    shape = Reference(SHAPE.latent, mask=MASK)
    n, out = edited(model, injection(shape=shape))
    plain = oracle.edited_attention(AttentionEdit("none"), project(model, n))
    assert_equals(out, plain + MASK.flatten().double().numpy()[:, None] * (read(model, WIDE) - plain))


def test_only_the_positive_row_where_that_is_asked_for(model: Patcher) -> None:
    n, out = edited(model, injection(rows="positive"))
    plain = oracle.edited_attention(AttentionEdit("none"), project(model, n))
    assert_equals(out, np.stack((plain[0], read(model, WIDE)[0])))  # ComfyUI puts the negative row first


def test_strength_zero_and_the_model_put_in_are_the_plain_model_bit_for_bit(model: Patcher) -> None:
    plain = sample(model)
    assert torch.equal(sample(attach(model, injection(replace(MATCHED, strength=0.0)))), plain)
    patched = attach(model, injection())
    assert float((sample(patched) - plain).abs().max()) > 1e-3
    assert torch.equal(sample(model), plain)


def test_rows_together_or_apart(model: Patcher) -> None:
    patched = attach(model, injection(sites="all", mask=MASK))
    torch.testing.assert_close(sample(with_low_memory(patched)), sample(patched), atol=2e-5, rtol=1e-4)


def test_a_batch_of_three_is_the_three_one_by_one(model: Patcher) -> None:
    patched = attach(model, injection(sites="all"))
    one_by_one = torch.cat([sample(patched, noise=noise) for noise in NOISE.split(1)])
    torch.testing.assert_close(sample(patched, noise=NOISE), one_by_one, atol=2e-5, rtol=1e-4)


def test_tiles_read_what_the_whole_reads(model: Patcher) -> None:
    """What features chose keeps its place while another pack cuts the tokens into tiles."""
    tiled = at_the_fine_site(attach(at_the_fine_site_only(hypertile, model), injection()))
    torch.testing.assert_close(tiled, at_the_fine_site(attach(model, injection())), atol=2e-5, rtol=1e-4)


def test_the_report_shows_what_was_read(model: Patcher) -> None:
    patched = attach(model, injection())
    sample(patched)
    report = last_report(patched)
    assert report.calls == {SITE: 3}
    assert report.change[SITE] > 0.01
    found = pair(WIDE).at((16, 16), GRIDS[WIDE])
    share = torch.zeros(160).index_add(0, found.index.flatten(), found.weight.flatten())
    assert report.reading is not None
    torch.testing.assert_close(report.reading, (share / share.max()).reshape(8, 20))


def test_one_match_for_each_reference() -> None:
    with pytest.raises(ValueError, match="2 references have 1"):
        injection(MATCHED, TALL, WIDE, matches=(pair(TALL),))


@pytest.mark.parametrize("split", [False, True], ids=["together", "apart"])
def test_the_output_is_looked_at_again_every_so_many_steps(model: Patcher, split: bool) -> None:
    """Of four steps the second and the fourth look: the third reads by what the second saw."""
    seen: list[Tensor] = []

    def look(latent: Tensor) -> Features:
        seen.append(latent.clone())
        return looks((7, 7), 30 + len(seen))

    refreshed = attach(model, injection(refresh=Refresh(2, look)))
    plain, found = (with_record_of_site(one, "output", 3) for one in (attach(model, injection()), refreshed))
    for one, _ in (plain, found):
        sample(with_low_memory(one) if split else one, steps=4)
    assert [tuple(one.shape) for one in seen] == [(1, 4, 16, 16)] * 2
    calls = 2 if split else 1
    same = [torch.equal(a, b) for a, b in zip(plain[1], found[1], strict=True)]
    assert same[: 2 * calls] == [True] * (2 * calls)
    assert not any(same[2 * calls :])


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_diffusion_transformers_read_by_features_too(family: str) -> None:
    """Beside their prompt's tokens; the operator's own test says what is read."""
    kind = KINDS[family]
    model, reference = kind.build(), Reference(random(1, 16, 10, 14, seed=2))
    match = Correspondence(looks((7, 7), 1), looks((5, 7), 2), Matching())
    asked = {"noise": kind.noise(2), "positive": kind.prompt(101), "negative": kind.prompt(102), "steps": 2}

    def drawn(edit: AttentionEdit, apart: bool = False) -> Tensor:
        patched = attach_any(model, Injection(edit, (reference,), sites="all", matches=(match,)))
        return sample(with_low_memory(patched) if apart else patched, **asked)

    plain, read = sample(model, **asked), drawn(MATCHED)
    assert float((read - plain).abs().max()) > 1e-2
    assert torch.equal(drawn(replace(MATCHED, strength=0.0)), plain)
    torch.testing.assert_close(drawn(MATCHED, apart=True), read, atol=2e-4, rtol=1e-3)
    asking = drawn(replace(MATCHED, reference="replace", matched=0.5))
    assert float((asking - read).abs().max()) > 1e-3
