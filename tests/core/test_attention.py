"""The attention operator against a materialised float64 oracle, and its invariants."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from inversion_core import attention as module
from inversion_core.attention import (
    AttentionEdit,
    Beside,
    ReferenceMode,
    ReferenceTokens,
    Tokens,
    attention_weighted_adain,
    edited_attention,
    readable_tokens,
    scaled_dot_product,
)

from . import reference_attention as oracle

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
MODES: tuple[ReferenceMode, ...] = get_args(ReferenceMode)


class Case:
    """Random inputs of one attention call: B 2, two references of unequal size, one of them with batch 1."""

    def __init__(
        self,
        seed: int = 0,
        *,
        b: int = 2,
        heads: int = 3,
        n: int = 7,
        n_refs: tuple[int, ...] = (5, 9),
        d: int = 6,
        dtype: torch.dtype = torch.float64,
        masked: bool = False,
        n_keys: int | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.generator, self.dtype = generator, dtype
        nk = n_keys or n
        self.own = Tokens(normal(b, heads, n, d), normal(b, heads, nk, d), normal(b, heads, nk, d))
        self.shape = Tokens(normal(1, heads, n, d), normal(1, heads, nk, d), normal(1, heads, nk, d))
        self.references = []
        for i, m in enumerate(n_refs):
            rb = b if i % 2 == 0 else 1
            k, v, q = (normal(rb, heads, m, d) * (1 + i) + i for _ in range(3))
            mask = self.mask(b if i % 2 else 1, m) if masked else None
            self.references.append(ReferenceTokens(k, v, mask, q=q))
        self.mask_out = self.mask(b, n)

    def mask(self, b: int, n: int) -> Tensor:
        """A mask with zeros, ones and values between, never empty."""
        kind = torch.randint(0, 3, (b, n), generator=self.generator)
        kind[:, 0] = 1
        soft = torch.rand(b, n, generator=self.generator) * 0.9 + 0.05
        return torch.where(kind == 2, soft, kind.to(soft))

    def run(self, edit: AttentionEdit, **options: Any) -> Tensor:
        return edited_attention(edit, self.own, self.references, shape=self.shape, **options)

    def expected(self, edit: AttentionEdit, mask_out: Tensor | None = None) -> np.ndarray:
        return oracle.edited_attention(edit, self.own, self.references, self.shape, mask_out)


def assert_close(actual: Tensor, expected: np.ndarray, scale: float = 1.0) -> None:
    assert actual.isfinite().all()
    bound = TOLERANCE[actual.dtype] * scale * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(oracle.array(actual), expected, rtol=0, atol=bound)


FIELDS: list[dict[str, Any]] = [
    {"reference": "none"},
    {"reference": "replace"},
    {"reference": "extend"},
    {"reference": "normalise"},
    {"reference": "none", "shape_query": 0.75},
    {"reference": "none", "shape_query": 1.0},
    {"reference": "none", "shape_key": 0.3},
    {"reference": "normalise", "shape_query": 1.0, "shape_key": 1.0},
    {"reference": "extend", "shape_key": 1.0},
    {"reference": "extend", "qk_stats": True},
    {"reference": "none", "qk_stats": True},
    {"reference": "replace", "contrast": 1.67},
    {"reference": "extend", "contrast": 3.0, "reference_bias": 0.5},
    {"reference": "replace", "contrast": 1.67, "contrast_form": "linear"},
    {"reference": "extend", "contrast": 3.0, "contrast_form": "linear", "reference_bias": -0.7},
    {"reference": "replace", "temperature": 1.5},
    {"reference": "extend", "temperature": 0.4, "contrast": 2.0},
    {"reference": "extend", "reference_bias": math.log(2)},
    {"reference": "replace", "strength": 0.3},
]


@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
@pytest.mark.parametrize("fields", FIELDS, ids=lambda f: "-".join(f"{k}={v}" for k, v in f.items()))
def test_each_field_equals_the_oracle(fields: dict[str, Any], masked: bool) -> None:
    case, edit = Case(masked=masked), AttentionEdit(**fields)
    assert_close(case.run(edit), case.expected(edit))
    assert_close(case.run(edit, mask_out=case.mask_out), case.expected(edit, case.mask_out))


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.5, 0.25)], ids=["full", "weak"])
@pytest.mark.parametrize("biased", [False, True], ids=["all", "biased"])
@pytest.mark.parametrize("fields", FIELDS, ids=lambda f: "-".join(f"{k}={v}" for k, v in f.items()))
def test_what_lies_beside_is_read_whatever_the_edit(
    fields: dict[str, Any], biased: bool, strengths: tuple[float, float]
) -> None:
    case, edit = Case(masked=True), AttentionEdit(**fields)
    case.references = [replace(r, strength=s) for r, s in zip(case.references, strengths, strict=True)]
    k, v = (torch.randn(2, 3, 4, 6, generator=case.generator, dtype=torch.float64) for _ in range(2))
    bias = torch.tensor([[0.0, -1.0, -torch.inf, 0.7]], dtype=torch.float64) if biased else None
    beside = Beside(k, v, bias)
    for mask in (None, case.mask_out):
        expected = oracle.edited_attention(edit, case.own, case.references, case.shape, mask, beside)
        assert_close(case.run(edit, beside=beside, mask_out=mask), expected)
        assert np.abs(expected - case.expected(edit, mask)).max() > 1e-3


def test_tokens_beside_of_another_batch_are_refused() -> None:
    case = Case()
    one = torch.zeros(1, 3, 4, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"beside have k \(1, 3, 4, 6\).*needed is \(2, 3, N_beside, 6\)"):
        case.run(AttentionEdit(), beside=Beside(one, one))


@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_matched_values_are_mixed_with_what_the_rest_gives(share: float, masked: bool) -> None:
    case, rest = Case(), AttentionEdit("extend", shape_query=0.5)
    matched = torch.randn(1, *case.own.q.shape[1:], generator=case.generator, dtype=torch.float64)
    asked, plain = case.expected(rest), case.expected(AttentionEdit("none"))
    mixed = asked + share * (matched.numpy() - asked)
    mask = case.mask_out if masked else None
    weight = 0.6 * (1.0 if mask is None else mask.double()[:, None, :, None].numpy())
    edit = replace(rest, matched=share, strength=0.6)
    assert_close(case.run(edit, matched=matched, mask_out=mask), plain + weight * (mixed - plain))


@pytest.mark.parametrize("biased", [False, True], ids=["all", "biased"])
def test_beside_matched_values_the_rest_keeps_its_share_of_the_attention(biased: bool) -> None:
    case = Case()
    k, v = (torch.randn(2, 3, 4, 6, generator=case.generator, dtype=torch.float64) for _ in range(2))
    bias = torch.tensor([[0.0, -1.0, -torch.inf, 0.7]], dtype=torch.float64) if biased else None
    logits = case.own.q @ torch.cat((k, case.own.k), dim=2).transpose(2, 3) / math.sqrt(6)
    if bias is not None:
        logits[..., :4] += bias
    shares = logits.softmax(dim=-1)
    expected = shares[..., :4] @ v + shares[..., 4:].sum(-1, keepdim=True) * case.own.v.flip(0)
    edit = AttentionEdit("none", matched=1.0)
    assert_close(case.run(edit, matched=case.own.v.flip(0), beside=Beside(k, v, bias)), expected.numpy())


def test_matched_values_that_lack_or_do_not_fit_are_refused() -> None:
    case, edit = Case(), AttentionEdit("none", matched=1.0)
    for matched in (None, case.own.q[:, :, :-1]):
        with pytest.raises(ValueError, match=r"matched values as \(B or 1, H, N, D\)"):
            case.run(edit, matched=matched)


edits = st.builds(
    AttentionEdit,
    reference=st.sampled_from(MODES),
    shape_query=st.sampled_from([0.0, 0.4, 1.0]),
    shape_key=st.sampled_from([0.0, 0.6, 1.0]),
    qk_stats=st.booleans(),
    contrast=st.sampled_from([1.0, 1.67, 4.0]),
    contrast_form=st.sampled_from(["exact", "linear"]),
    temperature=st.sampled_from([0.5, 1.0, 1.5]),
    reference_bias=st.sampled_from([-3.0, 0.0, math.log(2)]),
    strength=st.sampled_from([0.0, 0.25, 1.0]),
)


@settings(max_examples=80, deadline=None)
@given(
    edit=edits,
    seed=st.integers(0, 10_000),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 12), st.sampled_from([1, 4, 5, 8, 40])),
    n_refs=st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple),
    strengths=st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=3, max_size=3),
    masked=st.booleans(),
    with_mask_out=st.booleans(),
    n_keys=st.sampled_from([None, 3, 10]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_random_mixtures_equal_the_oracle(
    edit: AttentionEdit,
    seed: int,
    sizes: tuple[int, int, int, int],
    n_refs: tuple[int, ...],
    strengths: list[float],
    masked: bool,
    with_mask_out: bool,
    n_keys: int | None,
    dtype: torch.dtype,
) -> None:
    b, heads, n, d = sizes
    if edit.qk_stats and dtype not in (torch.float64, torch.float32):
        edit = replace(edit, qk_stats=False)  # tiny random statistics amplify half precision without bound
    if edit.qk_stats:
        n, n_keys = n + 4, (n_keys or 8) + 4
    case = Case(seed, b=b, heads=heads, n=n, n_refs=n_refs, d=d, dtype=dtype, masked=masked, n_keys=n_keys)
    case.references = [replace(r, strength=s) for r, s in zip(case.references, strengths, strict=False)]
    mask_out = case.mask_out if with_mask_out else None
    actual = case.run(edit, mask_out=mask_out)
    assert actual.dtype == dtype and actual.shape == case.own.q.shape
    # Masks and biases are float32 whatever the tokens are, so float64 is only as exact as they are.
    scale = edit.contrast * max(1, edit.temperature) * (1e4 if dtype == torch.float64 else 1)
    assert_close(actual, case.expected(edit, mask_out), scale=scale)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_soft_bias_keeps_its_precision_in_every_dtype(dtype: torch.dtype) -> None:
    """The bias alone decides here (queries are 0), so an error in it shows in full."""
    case = Case(dtype=dtype, masked=True, d=40)
    case.own = case.own._replace(q=torch.zeros_like(case.own.q))
    edit = AttentionEdit("extend", reference_bias=5.3)
    expected = case.expected(edit)
    eps = max(torch.finfo(dtype).eps, 1e-7)
    error = np.abs(oracle.array(case.run(edit)) - expected).max()
    assert error < (2 * eps if dtype != torch.float64 else 1e-12) * np.abs(expected).max()


def overflow_prone(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """A host's attention that keeps everything, the unscaled scores included, in the dtype of its input."""
    assert mask is None
    return ((q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v


@pytest.mark.parametrize("attend", [scaled_dot_product, overflow_prone])
@pytest.mark.parametrize("contrast", [{}, {"contrast": 1.67}, {"contrast": 1.67, "contrast_form": "linear"}], ids=str)
@pytest.mark.parametrize("mode", ["replace", "extend"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_masked_token_has_no_influence_at_all(
    dtype: torch.dtype, mode: Any, contrast: dict[str, Any], attend: Any
) -> None:
    case = Case(dtype=dtype, masked=True, d=40)
    edit = AttentionEdit(mode, **contrast)
    before = case.run(edit, attend=attend)
    for poison in (float("nan"), 6e4):
        poisoned = []
        for r in case.references:
            assert r.mask is not None
            hidden = (r.mask == 0)[:, None, :, None]
            assert hidden.any()
            poisoned.append(replace(r, k=r.k.masked_fill(hidden, poison), v=r.v.masked_fill(hidden, poison), q=None))
        after = edited_attention(edit, case.own, poisoned, shape=case.shape, attend=attend)
        assert before.isfinite().all() and torch.equal(before, after)


@settings(max_examples=40, deadline=None)
@given(edit=edits, seed=st.integers(0, 10_000), poison=st.sampled_from([float("nan"), float("inf"), -6e4, 1e300]))
def test_no_mixture_lets_a_masked_token_through(edit: AttentionEdit, seed: int, poison: float) -> None:
    case = Case(seed, masked=True)
    before = case.run(edit)
    poisoned = []
    for r in case.references:
        assert r.mask is not None and r.q is not None
        hidden = (r.mask == 0)[:, None, :, None]
        k, v, q = (x.masked_fill(hidden, poison) for x in (r.k, r.v, r.q))
        poisoned.append(replace(r, k=k, v=v, q=q))
    case.references = poisoned
    assert before.isfinite().all() and torch.equal(before, case.run(edit))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_hard_mask_equals_leaving_the_tokens_out(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, n_refs=(9,), d=64)
    mask = torch.tensor([[1.0, 0, 1, 1, 0, 0, 1, 0, 1]])
    kept = readable_tokens(mask).kept
    assert kept is not None and kept.tolist() == [0, 2, 3, 6, 8]
    (r,) = case.references
    short = ReferenceTokens(r.k[:, :, kept], r.v[:, :, kept])
    for edit in (AttentionEdit(), AttentionEdit("extend"), AttentionEdit(contrast=1.67)):
        masked = edited_attention(edit, case.own, [replace(r, mask=mask)])
        assert_close(masked, oracle.array(edited_attention(edit, case.own, [short])), scale=0.3)


@pytest.mark.parametrize("mode", MODES)
def test_strength_zero_is_the_plain_attention_and_nothing_else(mode: ReferenceMode) -> None:
    case, calls = Case(dtype=torch.float16, masked=True), []

    def attend(*arguments: Any) -> Tensor:
        calls.append((arguments, scaled_dot_product(*arguments)))
        return calls[-1][1]

    edit = AttentionEdit(mode, 1.0, 1.0, True, 2.0, "exact", 2.0, 1.0, strength=0.0)
    out = case.run(edit, mask_out=case.mask_out, attend=attend)
    ((arguments, returned),) = calls
    assert out is returned
    assert all(a is b for a, b in zip(arguments, (*case.own, None), strict=True))
    h = torch.randn(2, 7, 6)
    assert attention_weighted_adain(h, h, case.own.q, case.own.k, strength=0.0) is h


@settings(max_examples=30, deadline=None)
@given(edit=edits, seed=st.integers(0, 10_000))
def test_strength_zero_is_identity_whatever_else_is_asked_for(edit: AttentionEdit, seed: int) -> None:
    case = Case(seed, masked=True)
    out = case.run(replace(edit, strength=0.0), mask_out=case.mask_out)
    assert torch.equal(out, scaled_dot_product(*case.own))


def test_a_neutral_edit_is_the_plain_attention_bit_for_bit() -> None:
    case = Case(dtype=torch.float16)
    assert torch.equal(case.run(AttentionEdit("none")), scaled_dot_product(*case.own))


@pytest.mark.parametrize(
    ("edit", "masked", "calls"),
    [
        (AttentionEdit(), False, 1),
        (AttentionEdit("extend", reference_bias=0.7), False, 1),
        (AttentionEdit(contrast=1.67, contrast_form="linear"), False, 1),
        (AttentionEdit(contrast=1.67), False, 0),
        (AttentionEdit(), True, 2),
        (AttentionEdit(strength=0.5), False, 2),
    ],
)
def test_attention_calls_are_counted(edit: AttentionEdit, masked: bool, calls: int) -> None:
    """Full strength without a mask computes no plain attention; exact contrast needs none of the host's."""
    case, seen = Case(), []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] and mask is None
        seen.append(q.shape)
        return scaled_dot_product(q, k, v, mask)

    case.run(edit, mask_out=case.mask_out if masked else None, attend=attend)
    assert len(seen) == calls


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_reference_equal_to_the_own_tokens_changes_nothing_in_replace(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    same = ReferenceTokens(case.own.k, case.own.v, torch.ones(1, 7), strength=0.4)
    out = edited_attention(AttentionEdit(reference_bias=2.0), case.own, [same])
    assert_close(out, oracle.array(scaled_dot_product(*case.own)))
    unmasked = edited_attention(AttentionEdit(reference_bias=2.0), case.own, [replace(same, mask=None)])
    assert torch.equal(unmasked, scaled_dot_product(*case.own))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 9),
    copies=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=3),
    strength=st.floats(0, 1),
    bias=st.floats(-50, 50),
)
def test_any_copies_of_the_own_tokens_change_nothing_in_replace(
    seed: int, n: int, copies: list[float], strength: float, bias: float
) -> None:
    """However strong each copy is: a key that stands there twice shares its weight with its twin."""
    case = Case(seed, n=n)
    same = [ReferenceTokens(case.own.k, case.own.v, strength=one) for one in copies]
    out = edited_attention(AttentionEdit(strength=strength, reference_bias=bias), case.own, same)
    assert_close(out, oracle.array(scaled_dot_product(*case.own)))


@settings(max_examples=30, deadline=None)
@given(edit=edits, seed=st.integers(0, 10_000))
def test_permuting_reference_tokens_changes_nothing(edit: AttentionEdit, seed: int) -> None:
    case = Case(seed, masked=True)
    before = case.run(edit)
    permuted = []
    for r in case.references:
        order = torch.randperm(r.k.shape[2], generator=case.generator)
        assert r.mask is not None and r.q is not None
        permuted.append(ReferenceTokens(r.k[:, :, order], r.v[:, :, order], r.mask[:, order], q=r.q[:, :, order]))
    case.references = permuted
    assert_close(case.run(edit), oracle.array(before))


@settings(max_examples=25, deadline=None)
@given(edit=edits, seed=st.integers(0, 10_000))
def test_masks_of_ones_equal_no_masks(edit: AttentionEdit, seed: int) -> None:
    case = Case(seed)
    before = case.run(edit)
    case.references = [replace(r, mask=torch.ones(1, r.k.shape[2])) for r in case.references]
    assert_close(case.run(edit, mask_out=torch.ones(1, 7)), oracle.array(before))


def test_the_output_mask_leaves_the_outside_bit_identical() -> None:
    case = Case(dtype=torch.float16)
    mask = torch.tensor([[0.0, 1, 0, 1, 1, 0, 0]])
    out, plain = case.run(AttentionEdit(), mask_out=mask), scaled_dot_product(*case.own)
    inside = mask[0] > 0
    assert torch.equal(out[:, :, ~inside], plain[:, :, ~inside])
    assert torch.equal(out[:, :, inside], case.run(AttentionEdit())[:, :, inside])


def test_a_reference_of_strength_zero_is_left_out() -> None:
    case = Case(masked=True)
    first, second = case.references
    edit = AttentionEdit("extend", qk_stats=True)
    alone = edited_attention(edit, case.own, [first])
    assert torch.equal(edited_attention(edit, case.own, [first, replace(second, strength=0.0)]), alone)
    assert torch.equal(
        edited_attention(AttentionEdit(), case.own, [replace(first, strength=0.0)]), scaled_dot_product(*case.own)
    )


def test_a_row_without_readable_tokens_gives_zero_not_nan() -> None:
    case = Case(n_refs=(5,), dtype=torch.float16)
    mask = torch.tensor([[0.0] * 5, [1.0] * 5])
    for edit in (AttentionEdit(), AttentionEdit(contrast=1.67)):
        out = edited_attention(edit, case.own, [replace(case.references[0], mask=mask)])
        assert torch.equal(out[0], torch.zeros_like(out[0])) and out[1].abs().sum() > 0


class Recorder(TorchDispatchMode):
    """Notes the largest tensor any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("fields", [{"contrast": 1.67}, {"reference": "extend", "reference_bias": 0.7}], ids=str)
def test_no_matrix_of_tokens_by_tokens_at_4096_tokens(fields: dict[str, Any]) -> None:
    n = 4096
    own = Tokens(*(torch.randn(1, 1, n, 8) for _ in range(3)))
    with Recorder() as recorder:
        edited_attention(AttentionEdit(**fields), own, [ReferenceTokens(own.k, own.v, torch.rand(1, n))])
    assert recorder.largest <= module.CONTRAST_CHUNK_BYTES["cpu"] < n * n * 4


@pytest.mark.parametrize("chunk_bytes", [1, 8 * 14 * 3])
def test_the_chunks_of_exact_contrast_do_not_show(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    case, edit = Case(masked=True), AttentionEdit(contrast=1.67)
    monkeypatch.setitem(module.CONTRAST_CHUNK_BYTES, "cpu", chunk_bytes)
    assert_close(case.run(edit), case.expected(edit))


def test_the_clip_matters_and_the_linear_form_has_none() -> None:
    case = Case()
    exact, linear = (case.run(AttentionEdit(contrast=3.0, contrast_form=form)) for form in ("exact", "linear"))
    assert (exact - linear).abs().max() > 0.1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["exact", "linear"])
def test_nothing_waits_for_the_device_and_no_input_changes(mode: ReferenceMode, form: Any) -> None:
    """Tensors on the meta device hold no values: reading one on the host raises."""
    edit = AttentionEdit(mode, 0.5, 0.5, True, 1.67, form, 1.5, 0.7, 0.5, 0.5)
    case = Case(masked=True)

    def meta(x: Tensor | None) -> Any:
        return None if x is None else x.to("meta")

    references = [ReferenceTokens(meta(r.k), meta(r.v), meta(r.mask), 0.5, meta(r.q)) for r in case.references]
    own, shape = (Tokens(*(x.to("meta") for x in t)) for t in (case.own, case.shape))
    out = edited_attention(edit, own, references, shape=shape, matched=own.v, mask_out=meta(case.mask_out))
    assert out.shape == own.q.shape
    h, h_ref = torch.zeros(2, 7, 6, device="meta"), torch.zeros(2, 5, 6, device="meta")
    attention_weighted_adain(
        h, h_ref, own.q, references[0].k, mask_ref=references[0].mask, mask_out=meta(case.mask_out)
    )

    inputs = [*case.own, *case.shape, case.mask_out]
    for r in case.references:
        inputs += [x for x in (r.k, r.v, r.q, r.mask) if x is not None]
    copies, versions = [x.clone() for x in inputs], [x._version for x in inputs]
    case.run(edit, matched=case.own.v, mask_out=case.mask_out)
    assert [x._version for x in inputs] == versions
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("fields", [{"contrast": 1.67}, {"reference": "extend", "qk_stats": True}], ids=str)
def test_gradients_are_right(fields: dict[str, Any]) -> None:
    case = Case(b=1, heads=1, n=4, n_refs=(3,), d=2, masked=True)
    own = [x.requires_grad_() for x in case.own]
    assert torch.autograd.gradcheck(
        lambda *x: edited_attention(AttentionEdit(**fields), Tokens(*x), case.references), own
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 12), st.sampled_from([3, 8])),
    width=st.integers(1, 10),
    n_ref=st.integers(2, 12),
    masked=st.booleans(),
    strength=st.sampled_from([0.3, 1.0]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_attention_weighted_adain_equals_the_oracle(
    seed: int,
    sizes: tuple[int, int, int, int],
    width: int,
    n_ref: int,
    masked: bool,
    strength: float,
    dtype: torch.dtype,
) -> None:
    b, heads, n, d = sizes
    case = Case(seed, b=b, heads=heads, n=n, n_refs=(n_ref,), d=d, dtype=dtype)
    (r,) = case.references
    h = torch.randn(b, n, heads * width, generator=case.generator).to(dtype)
    h_ref = torch.randn(1 if seed % 2 else b, n_ref, heads * width, generator=case.generator).to(dtype) * 3 + 2
    mask_ref, mask_out = (case.mask(b, n_ref), case.mask_out) if masked else (None, None)
    out = attention_weighted_adain(h, h_ref, case.own.q, r.k, mask_ref=mask_ref, mask_out=mask_out, strength=strength)
    expected = oracle.attention_weighted_adain(h, h_ref, case.own.q, r.k, mask_ref, mask_out, strength)
    # A deviation of 0 is the root of a difference of 1e-16 or 1e-7, hence the root of the usual tolerance.
    assert np.abs(oracle.array(out) - expected).max() < {torch.float64: 1e-6, torch.float32: 5e-3}[dtype]


def test_attention_weighted_adain_in_half_precision_and_one_call() -> None:
    """A large common offset would drown the deviation in half precision if the raw values were squared."""
    generator = torch.Generator().manual_seed(0)
    h, h_ref = (torch.randn(2, 16, 24, generator=generator) for _ in range(2))
    q, k = (torch.randn(2, 3, 16, 8, generator=generator) for _ in range(2))
    h, h_ref, q, k = h.half(), (h_ref + 20).half(), q.half(), k.half()
    calls = []

    def attend(*x: Any) -> Tensor:
        calls.append(x[0].shape)
        return scaled_dot_product(*x)

    out = attention_weighted_adain(h, h_ref, q, k, attend=attend)
    assert out.dtype == torch.float16 and len(calls) == 1
    assert np.abs(oracle.array(out) - oracle.attention_weighted_adain(h, h_ref, q, k)).max() < 0.05


@pytest.mark.parametrize("poison", [float("nan"), 6e4])
def test_a_masked_token_has_no_influence_on_attention_weighted_adain(poison: float) -> None:
    case = Case(dtype=torch.float16, n_refs=(9,))
    h, h_ref = torch.randn(2, 7, 12).half(), torch.randn(2, 9, 12).half()
    mask = torch.tensor([[1.0, 0, 1, 0.5, 0, 1, 1, 0, 1]])
    k, hidden = case.references[0].k, mask[0] == 0
    before = attention_weighted_adain(h, h_ref, case.own.q, k, mask_ref=mask)
    h_ref[:, hidden] = poison
    k[:, :, hidden] = poison
    assert before.isfinite().all()
    assert torch.equal(before, attention_weighted_adain(h, h_ref, case.own.q, k, mask_ref=mask))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reference", "swap"),
        ("contrast_form", "fast"),
        ("shape_query", -0.1),
        ("shape_key", 1.1),
        ("contrast", 0.5),
        ("temperature", 0.0),
        ("reference_bias", float("inf")),
        ("strength", float("nan")),
    ],
)
def test_values_out_of_range_are_refused_with_the_value_and_the_range(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} is .*{value}.*allowed"):
        AttentionEdit(**{field: value})


def test_inputs_that_do_not_fit_are_refused() -> None:
    case = Case()
    first = case.references[0]
    with pytest.raises(ValueError, match="needs at least one reference"):
        edited_attention(AttentionEdit(), case.own, [])
    with pytest.raises(ValueError, match="shape_query is 0.5 but there is no shape reference"):
        edited_attention(AttentionEdit(shape_query=0.5), case.own, case.references)
    with pytest.raises(ValueError, match="reference's queries"):
        edited_attention(AttentionEdit(qk_stats=True), case.own, [replace(first, q=None)])
    with pytest.raises(ValueError, match="reference 0 has keys"):
        edited_attention(AttentionEdit(), case.own, [ReferenceTokens(first.k[..., :3], first.v[..., :3])])
    with pytest.raises(ValueError, match="mask is .2, 4., needed is .B or 1, 5."):
        replace(first, mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="mask has shape .1, 8."):
        case.run(AttentionEdit(), mask_out=torch.ones(1, 8))
    with pytest.raises(ValueError, match="shape reference has q"):
        edited_attention(AttentionEdit(), case.own, [first], shape=Tokens(*(x[:, :, :4] for x in case.shape)))
    with pytest.raises(ValueError, match="reference strength is -1"):
        replace(first, strength=-1)


def test_readable_tokens() -> None:
    everything = readable_tokens(torch.ones(2, 4))
    assert everything.kept is None and everything.mask is None
    soft = readable_tokens(torch.tensor([[0.0, 0.5, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]]))
    assert soft.kept is not None and soft.kept.tolist() == [1, 2]
    assert soft.mask is not None and soft.mask.tolist() == [[0.5, 1.0], [1.0, 0.0]]
    hard = readable_tokens(torch.tensor([[0.0, 1.0]]))
    assert hard.kept is not None and hard.kept.tolist() == [1] and hard.mask is None
    with pytest.raises(ValueError, match=r"appearance mask is empty .*\[1\] of 2"):
        readable_tokens(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "appearance mask")
    with pytest.raises(ValueError, match="flatten"):
        readable_tokens(torch.ones(1, 2, 2))
