"""Soft matching against dense float64 arithmetic, and what must hold for any features."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from inversion_core import correspondence as module
from inversion_core.correspondence import (
    Correspondence,
    CorrespondenceBank,
    Grid,
    Matching,
    SparseMap,
    nearest,
    potentials,
    rearranged,
)
from inversion_core.features import Features

A, B = (5, 7), (6, 4)
"""Grids of two pictures of different shape."""
PLAIN = Matching("tokens", False, temperature=0.1, top_k=1000, balance=0)


def features(grid: Grid, seed: int = 0, channels: int = 12, tokens: Tensor | None = None) -> Features:
    generator = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1]
    if tokens is None:
        tokens = torch.randn(1, n, channels, generator=generator) * 3
    keys = torch.randn(1, 2, n, channels // 2, generator=generator)
    return Features(grid, tokens * 2, tokens, keys, None, None, None, f"{grid} {seed}")


def random_mask(height: int, width: int, seed: int) -> Tensor:
    """(1, 1, H, W), about a third exactly 0."""
    values = torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(seed))
    return (values - 1 / 3).clamp_min(0) * 1.5


def dense(found: SparseMap, m: int) -> Tensor:
    """(N, M) float64."""
    return torch.zeros(len(found.index), m, dtype=torch.float64).scatter_add(1, found.index, found.weight.double())


def cosines(a: Features, b: Features, grid: Grid, reference_grid: Grid) -> Tensor:
    """(N, M) float64, of the tokens on other grids."""

    def units(one: Features, to: Grid) -> Tensor:
        maps = one.normed.double().transpose(1, 2).unflatten(2, one.grid)
        if to != one.grid:
            maps = F.interpolate(maps, size=to, mode="bilinear", antialias=True)
        tokens = maps.flatten(2)[0].T
        return tokens / tokens.norm(dim=1, keepdim=True)

    return units(a, grid) @ units(b, reference_grid).T


@pytest.mark.parametrize("grids", [(A, B), ((10, 14), (12, 8)), ((3, 4), (3, 2)), ((4, 9), (13, 3))])
def test_the_map_is_the_softmax_of_the_cosines(grids: tuple[Grid, Grid]) -> None:
    a, b = features(A, 1), features(B, 2)
    found = Correspondence(a, b, PLAIN).at(*grids)
    expected = (cosines(a, b, *grids) / 0.1).softmax(dim=1)
    assert_close(dense(found, expected.shape[1]), expected, atol=1e-5, rtol=1e-4)


def test_masked_tokens_are_never_read_and_soft_ones_less() -> None:
    a, b = features(A, 1), features(B, 2)
    mask = random_mask(*B, seed=3)
    found = Correspondence(a, b, PLAIN, reference_mask=mask).at(A, B)
    weighted = (cosines(a, b, A, B) / 0.1).exp() * mask.double().flatten()
    expected = weighted / weighted.sum(1, keepdim=True)
    assert_close(dense(found, 24), expected, atol=1e-5, rtol=1e-4)
    assert (dense(found, 24)[:, mask.flatten() == 0] == 0).all()


def test_fewer_readable_tokens_than_top_k() -> None:
    mask = torch.zeros(1, 1, *B)
    mask[..., 2, 1] = 1
    found = Correspondence(features(A, 1), features(B, 2), Matching(top_k=5), reference_mask=mask).at(A, B)
    expected = torch.zeros(35, 24, dtype=torch.float64)
    expected[:, 9] = 1
    assert_close(dense(found, 24), expected)
    poisoned = torch.randn(1, 2, 24, 3)
    poisoned[:, :, 9] = 7
    assert_close(found.apply(poisoned), torch.full((1, 2, 35, 3), 7.0))


def test_top_k_keeps_the_largest_and_shares_out_the_rest() -> None:
    a, b = features(A, 1), features(B, 2)
    found = Correspondence(a, b, Matching("tokens", False, 0.1, 3, 0)).at(A, B)
    scores, index = (cosines(a, b, A, B) / 0.1).topk(3, dim=1)
    assert torch.equal(found.index, index)
    assert_close(found.weight.double(), scores.softmax(dim=1), atol=1e-5, rtol=1e-4)


def test_the_keys_are_matched_if_asked_for() -> None:
    a, b = features(A, 1), features(B, 2)
    keys = [F.normalize(one.keys.double()[0].permute(1, 0, 2).flatten(1), dim=1) for one in (a, b)]
    found = Correspondence(a, b, Matching("keys", False, 0.2, 24, 0)).at(A, B)
    assert_close(dense(found, 24), (keys[0] @ keys[1].T / 0.2).softmax(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("balance", [0.0, 0.8, 1.0])
def test_a_picture_is_mapped_to_itself(balance: float) -> None:
    same = features(A, 1)
    pair = Correspondence(same, same, Matching(temperature=0.01, balance=balance))
    values = torch.randn(2, 3, 35, 4)
    assert_close(pair.at(A, A).apply(values), values, atol=1e-4, rtol=0)
    assert torch.equal(pair.nearest().there, torch.arange(35))
    assert bool(pair.nearest().mutual.all())
    assert bool((pair.confidence() == 1).all())


def test_centring_takes_the_objects_common_part_away() -> None:
    """Both show one object, each with something added to all of it, and the reference on another ground."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 35, 12, generator=generator)
    mask = (torch.arange(35) % 7 < 4).float().view(1, 1, *A)
    inside = mask.flatten() > 0
    tinted = tokens + 5 * torch.randn(12, generator=generator)
    tinted[:, ~inside] = torch.randn(1, int((~inside).sum()), 12, generator=generator) * 9
    a, b = features(A, tokens=tokens + 5 * torch.randn(12, generator=generator)), features(A, 1, tokens=tinted)
    where = torch.arange(35)[inside]
    plain, centred = (
        Correspondence(a, b, Matching("tokens", c, 0.01, balance=0), mask, mask).at(A, A) for c in (False, True)
    )
    assert torch.equal(centred.index[inside, 0], where)
    assert not torch.equal(plain.index[inside, 0], where)
    assert_close(centred.weight[inside, 0], torch.ones(len(where)), atol=1e-3, rtol=0)


def test_a_picture_rearranged_like_another() -> None:
    """B holds A's tokens in reverse order, so that B's cells come back in reverse order."""
    tokens = torch.randn(1, 6, 12, generator=torch.Generator().manual_seed(0))
    a, b = features((2, 3), tokens=tokens), features((3, 2), tokens=tokens.flip(1))
    pair = Correspondence(a, b, Matching(temperature=0.001, balance=0, centred=False))
    picture = torch.rand(1, 3, 12, 8, generator=torch.Generator().manual_seed(1))
    found = rearranged(picture, pair, cell=4)
    assert found.shape == (1, 3, 8, 12)
    for i in range(6):
        row, column = divmod(i, 3)
        there, across = divmod(5 - i, 2)
        cell = found[..., row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
        assert_close(cell, picture[..., there * 4 : there * 4 + 4, across * 4 : across * 4 + 4])


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(1, 20), st.floats(0, 1), st.floats(0.02, 1), st.integers(0, 99)
)
def test_rows_are_shares(h: int, w: int, top_k: int, balance: float, temperature: float, seed: int) -> None:
    a, b = features(A, seed), features(B, seed + 1)
    pair = Correspondence(
        a,
        b,
        Matching("tokens", False, temperature, top_k, balance),
        random_mask(9, 9, seed),
        random_mask(8, 6, seed + 1),
    )
    found = pair.at((h, w), (w, h))
    assert found.index.shape == found.weight.shape == (h * w, min(top_k, h * w))
    assert float(found.weight.min()) >= 0
    assert_close(found.weight.sum(1), torch.ones(h * w))
    assert bool((found.index >= 0).all()) and bool((found.index < h * w).all())
    read = found.apply(torch.ones(1, 1, h * w, 1))
    assert_close(read, torch.ones_like(read))


@settings(deadline=None)
@given(st.integers(0, 99))
def test_the_order_of_the_reference_does_not_matter(seed: int) -> None:
    """A row of tokens, so that a permutation is a picture again."""
    a = features((1, 9), seed)
    tokens = torch.randn(1, 11, 12, generator=torch.Generator().manual_seed(seed + 1))
    order = torch.randperm(11, generator=torch.Generator().manual_seed(seed + 2))
    matching = Matching("tokens", False, 0.2, 11, 0.7)
    plain = Correspondence(a, features((1, 11), tokens=tokens), matching).at((1, 9), (1, 11))
    moved = Correspondence(a, features((1, 11), tokens=tokens[:, order]), matching).at((1, 9), (1, 11))
    assert_close(dense(moved, 11), dense(plain, 11)[:, order], atol=1e-5, rtol=1e-4)


def sinkhorn(scores: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The plan of balanced entropic transport by plain alternate scaling, to convergence."""
    kernel = scores.exp()
    u, v = torch.ones_like(a), torch.ones_like(b)
    for _ in range(20000):
        u = a / (kernel @ v)
        v = b / (kernel.T @ u)
    return u[:, None] * kernel * v


def column_sums(scores: Tensor, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    return a @ (scores + b.log() + g).softmax(dim=1)


def test_balance_1_is_optimal_transport() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(13, 9, generator=generator, dtype=torch.float64) * 10
    a, b = (torch.rand(n, generator=generator, dtype=torch.float64) + 0.1 for n in (13, 9))
    a, b = a / a.sum(), b / b.sum()
    g = potentials(scores, a, b, 1.0, steps=2000)
    plan = a[:, None] * (scores + b.log() + g).softmax(dim=1)
    assert_close(plan, sinkhorn(scores, a, b), atol=1e-9, rtol=1e-6)
    assert_close(plan.sum(0), b, atol=1e-9, rtol=1e-6)


def test_balance_between_fulfils_its_condition() -> None:
    """The relaxed columns satisfy `sum_i P_ij = b_j exp(-g_j (1 - balance) / balance)` at the optimum."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(13, 9, generator=generator, dtype=torch.float64) * 10
    a, b = torch.full((13,), 1 / 13).double(), torch.full((9,), 1 / 9).double()
    for balance in (0.3, 0.8):
        g = potentials(scores, a, b, balance, steps=2000)
        assert_close(column_sums(scores, a, b, g), b * (-g * (1 - balance) / balance).exp(), atol=1e-9, rtol=1e-6)


@given(st.integers(0, 999))
@settings(deadline=None, max_examples=10)
def test_balance_brings_the_columns_closer_to_their_shares(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(20, 15, generator=generator, dtype=torch.float64) * 20
    a, b = (torch.rand(n, generator=generator, dtype=torch.float64) + 0.05 for n in (20, 15))
    a, b = a / a.sum(), b / b.sum()

    def divergence(balance: float) -> float:
        sums = column_sums(scores, a, b, potentials(scores, a, b, balance, steps=300))
        return float((sums * (sums / b).log()).sum())

    free, half, full = (divergence(balance) for balance in (0.0, 0.5, 1.0))
    assert free >= half >= full - 1e-12
    assert full < 1e-3


def test_masked_rows_have_no_say_and_masked_columns_no_share() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(12, 10, generator=generator, dtype=torch.float64) * 5
    a, b = torch.ones(12).double(), torch.ones(10).double()
    a[8:], b[7:] = 0, 0
    g = potentials(scores, a, b, 1.0, steps=500)
    assert bool(g.isfinite().all())
    assert_close(g[:7], potentials(scores[:8, :7], a[:8], b[:7], 1.0, steps=500))


def test_balance_uses_what_the_plain_softmax_neglects() -> None:
    """Every output token is most like one reference token; the others are still read."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 36, 12, generator=generator)
    tokens[:, :, 0] += 3
    reference = torch.randn(1, 36, 12, generator=generator)
    reference[:, 0] = 0
    reference[:, 0, 0] = 1
    a, b = features((6, 6), tokens=tokens), features((6, 6), tokens=reference)
    used = []
    for balance in (0.0, 0.8, 1.0):
        found = Correspondence(a, b, Matching("tokens", False, 0.1, 36, balance)).at((6, 6), (6, 6))
        used.append(dense(found, 36).mean(0))
    assert float(used[0].max()) > 0.2
    assert float(used[0].max()) > float(used[1].max()) > float(used[2].max())
    assert_close(used[2], torch.full((36,), 1 / 36).double(), atol=1e-3, rtol=0)


def test_the_potential_is_carried_to_other_grids() -> None:
    """Features of a picture vary slowly; what evens out their grid then evens out a finer one."""

    def smooth(seed: int) -> Features:
        coarse = torch.randn(1, 12, 3, 3, generator=torch.Generator().manual_seed(seed))
        fine = F.interpolate(coarse, size=(12, 12), mode="bicubic")
        return features((12, 12), tokens=fine.flatten(2).transpose(1, 2))

    def spread(balance: float) -> float:
        pair = Correspondence(smooth(1), smooth(2), Matching("tokens", False, 0.1, 10_000, balance))
        return float(dense(pair.at((24, 24), (24, 24)), 576).mean(0).sub(1 / 576).abs().sum())

    assert spread(1.0) < 0.2 * spread(0.0)


@pytest.mark.parametrize("way", ["_read_at_once", "_read_one_by_one"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_applying_is_a_matrix_product_per_head(dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_read_at_once", getattr(module, way))
    found = Correspondence(features(A, 1), features(B, 2), Matching(top_k=6)).at(A, B)
    values = torch.randn(3, 24, 2, 5, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(1, 2)
    read = found.apply(values)
    assert read.dtype == dtype
    assert read.shape == (3, 2, 35, 5)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    assert_close(read.double(), dense(found, 24) @ values.double(), atol=tolerance, rtol=tolerance)


def test_a_map_made_in_inference_mode_serves_a_graph() -> None:
    with torch.inference_mode():
        a, b = features(A, 1), features(B, 2)
        found = Correspondence(a, b, Matching(), None, random_mask(*B, seed=0)).at(A, B)
    values = torch.randn(1, 2, 24, 3).requires_grad_()
    found.apply(values).sum().backward()
    assert values.grad is not None
    columns = dense(found, 24).sum(0).float()
    assert_close(values.grad, columns[None, None, :, None].expand_as(values), atol=1e-5, rtol=1e-4)


def test_nearest_neighbours_by_hand() -> None:
    a = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, -1.0]]), dim=1)
    b = F.normalize(torch.tensor([[0.1, 1.0], [1.0, 0.05]]), dim=1)
    found = nearest(a, b)
    assert found.there.tolist() == [1, 1, 0, 1]
    assert found.back.tolist() == [2, 0]
    assert found.mutual.tolist() == [True, False, True, False]
    assert_close(found.similarity, (a @ b.T).amax(1))
    masked = nearest(a, b, torch.tensor([False, True, True, True]), torch.tensor([True, False]))
    assert masked.there.tolist() == [0, 0, 0, 0]
    assert masked.back.tolist() == [2, 1]


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
def test_nearest_neighbours_are_those_of_the_whole_matrix(n: int, m: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (F.normalize(torch.randn(count, 5, generator=generator), dim=1) for count in (n, m))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", 4 * m * 3)
        found = nearest(a, b)
    scores = a @ b.T
    assert torch.equal(found.there, scores.argmax(1))
    assert torch.equal(found.back, scores.argmax(0))


def test_confidence_falls_with_the_way_back() -> None:
    """Output tokens 0..7 in a row; reference token 0 is nearest to 0 and 1 and 7, and goes back to 0."""
    angles = torch.tensor([0.0, 0.1, 1.2, 1.3, 1.4, 1.5, 1.6, 0.2])
    tokens = torch.stack((angles.cos(), angles.sin()), dim=1)[None]
    reference = torch.tensor([[[1.0, 0.0], [math.cos(1.4), math.sin(1.4)]]])
    pair = Correspondence(features((1, 8), tokens=tokens), features((1, 2), tokens=reference), Matching(centred=False))
    # A quarter of the longer side is 2 tokens: 1 is free, then half of the confidence each.
    assert_close(pair.confidence(), torch.tensor([1, 1, 0.5, 1, 1, 1, 0.5, 0]))


def test_a_chunk_is_all_that_ever_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr(module, "BALANCE_TOKENS", 256)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for one in result if isinstance(result, tuple | list) else [result]:
                if isinstance(one, Tensor):
                    largest = max(largest, one.numel() * one.element_size())
            return result

    a, b = features((8, 8), 1), features((8, 8), 2)
    whole = Correspondence(a, b, Matching(top_k=8)).at((40, 40), (40, 40))
    with Watch():
        found = Correspondence(a, b, Matching(top_k=8)).at((40, 40), (40, 40))
        found.apply(torch.zeros(1, 1, 1600, 8))
    assert 10 * largest < 1600 * 1600 * 4
    assert largest <= 1 << 18
    assert_close(dense(found, 1600), dense(whole, 1600))


def test_maps_and_pairs_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = features(A, 1), features(B, 2)
    mask = random_mask(*B, seed=0)
    bank = CorrespondenceBank()
    pair = bank.get(a, b, Matching(), None, mask)
    first = pair.at(A, B)
    monkeypatch.setattr(Correspondence, "_compute", None)
    again = bank.get(features(A, 1), features(B, 2), Matching(), None, mask.clone())
    assert again is pair
    assert again.at(A, B) is first
    others = [
        bank.get(a, b, Matching(top_k=3), None, mask),
        bank.get(b, a, Matching(), None, mask),
        bank.get(a, b, Matching(), mask, None),
        bank.get(a, features(B, 3), Matching(), None, mask),
    ]
    assert len({id(one) for one in (pair, *others)}) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0}, "temperature is 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"balance": 1.5}, "balance is 1.5"),
        ({"descriptor": "pixels"}, "descriptor is 'pixels', allowed are keys, tokens"),
    ],
)
def test_settings_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Matching(**arguments)


def test_what_does_not_fit_is_refused() -> None:
    a = features(A)
    with pytest.raises(ValueError, match="12 and 8 channels"):
        Correspondence(a, features(B, channels=8), Matching())
    two = features(A, tokens=torch.randn(2, 35, 12))
    with pytest.raises(ValueError, match="reference is a batch of 2"):
        Correspondence(a, two, Matching())
    with pytest.raises(ValueError, match="output mask is empty"):
        Correspondence(a, a, Matching(), torch.zeros(1, 1, 3, 3))
    with pytest.raises(ValueError, match=r"reference mask is \(3, 3\), needed is \(1, 1, H, W\)"):
        Correspondence(a, a, Matching(), None, torch.ones(3, 3))
