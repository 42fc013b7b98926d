"""The one attention operator: every training-free method of appearance and shape transfer as data.

Shapes: `q`, `k`, `v` are (B, H, N, D): batch, heads, tokens, channels of one head. Masks over tokens are (B or 1, N)
with values in [0, 1]. Logits are `temperature * q.k / sqrt(D) + bias`.

| method | paper | as an `AttentionEdit` |
| --- | --- | --- |
| MasaCtrl | arXiv 2304.08465 | `reference="replace"` |
| Cross-Image Attention | arXiv 2311.03335 | `reference="replace"`, `shape_query=1`, `contrast=1.67` |
| StyleAligned | arXiv 2312.02133 | `reference="extend"`, `qk_stats=True`, `reference_bias=log 2` for image references |
| Visual Style Prompting | arXiv 2402.12974 | `reference="replace"` |
| StyleID | arXiv 2312.09008 | `reference="replace"`, `shape_query=0.75`, `temperature=1.5` |
| Ctrl-X | arXiv 2406.07540 | `reference="normalise"`, `shape_query=1`, `shape_key=1` |
| Cross-Feature Attention | ours (docs/features.md) | `reference="none"`, `matched=1` |

Guarantees: no input is changed; nothing waits for the device (only `readable_tokens` does); memory is linear in the
tokens; statistics are float32 (float64 for float64 input); every plain attention goes through the host's own `attend`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .statistics import (
    ChannelStatistics,
    align_mask,
    apply_statistics,
    channel_statistics,
    require_nonempty_mask,
    standardise,
    statistics_dtype,
)

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""A host's attention: `q`, `k`, `v` (B, H, N, D) with one D, additive float mask broadcastable to (B, H, Nq, Nk) or
None; returns (B, H, Nq, D). It must scale by `1/sqrt(D)` of the D it receives, which may be larger than the model's
(see `edited_attention`), and take any batch size. The operator itself always passes None as mask."""

ReferenceMode = Literal["none", "replace", "extend", "normalise"]
ContrastForm = Literal["exact", "linear"]

CONTRAST_CHUNK_BYTES = {"cpu": 2**20, "accelerator": 16 * 2**20}
"""Largest score matrix of exact contrast; two of that size exist at once. One row of queries is the least it takes. On
an accelerator small ones would cost more in launches than they save."""

_MASKED_SCORE = -(2.0**15)
"""`q.k` of a key that may not be read, before the scaling: exact and finite in float16, weight exactly 0."""


@dataclass(frozen=True)
class AttentionEdit:
    """One self-attention edit. All fields combine freely; the defaults alone swap in the reference's K and V.

    The order of the operations: blend Q and K with the shape, match Q and K to the reference's statistics, choose the
    keys and values, attend (temperature, bias, contrast), blend with the plain attention (`strength`, mask).

    Raises:
        ValueError: a value outside its range.
    """

    reference: ReferenceMode = "replace"
    """How the appearance reference enters. `replace`: its K,V instead of the own (MasaCtrl). `extend`: [own; reference]
    (StyleAligned). `normalise`: K,V stay, the hidden state was changed before by `attention_weighted_adain` (Ctrl-X).
    `none`: K,V stay."""
    shape_query: float = 0.0
    """0 to 1. Share g of the shape reference's query: `q = g * q_shape + (1-g) * q` (StyleID's gamma; 1 = Ctrl-X)."""
    shape_key: float = 0.0
    """0 to 1. Share of the shape reference's key in the own keys; 1 = Ctrl-X. Without effect in `replace`."""
    qk_stats: bool = False
    """AdaIN of the own Q and K to the token statistics of the references' Q and K, per head and channel
    (StyleAligned)."""
    contrast: float = 1.0
    """1 to 10. Contrast s of the attention map, `A' = clip(s * (A - U) + U, 0, 1)`, rows not renormalised
    (Cross-Image Attention, 1.67). U is the map of a query that prefers nothing: `softmax(bias)`, hence `1/N = mean(A)`
    as published when there are no masks and no biases."""
    contrast_form: ContrastForm = "exact"
    """`exact`: as published, with the clip. `linear`: without the clip, `s * A V + (1-s) * U V`; cheaper, different."""
    temperature: float = 1.0
    """Above 0, at most 100. The logits are multiplied by it: above 1 is sharper (StyleID, 1.5)."""
    reference_bias: float = 0.0
    """-50 to 50. Added to the logits of reference keys (StyleAligned's shift, log 2). Without effect in `replace`."""
    matched: float = 0.0
    """0 to 1. Share of what was read without queries and keys, where features say (Cross-Feature Attention); at 1 all
    of the above is without effect."""
    strength: float = 1.0
    """0 to 1. Output between the plain and the edited attention; 0 = plain, bit for bit; 1 = as published."""

    def __post_init__(self) -> None:
        _require_choice("reference", self.reference, get_args(ReferenceMode))
        _require_choice("contrast_form", self.contrast_form, get_args(ContrastForm))
        _require_range("shape_query", self.shape_query, 0, 1, "0 keeps the own query, 1 takes the shape's")
        _require_range("shape_key", self.shape_key, 0, 1, "0 keeps the own key, 1 takes the shape's")
        _require_range("contrast", self.contrast, 1, 10, "1 is no contrast, 1.67 the published value")
        _require_range("temperature", self.temperature, 1e-3, 100, "1 is neutral, above 1 is sharper")
        _require_range("reference_bias", self.reference_bias, -50, 50, "0 is neutral, log 2 = 0.69 counts keys twice")
        _require_range("matched", self.matched, 0, 1, "0 asks by queries alone, 1 by features alone")
        _require_range("strength", self.strength, 0, 1, "0 is untouched, 1 as published")


class Tokens(NamedTuple):
    """Query, key and value of one attention call, each (B, H, N, D); k and v may have another N (merged tokens)."""

    q: Tensor
    k: Tensor
    v: Tensor


class Beside(NamedTuple):
    """Keys and values that every query reads besides the picture's: the prompt's, in a transformer's joint attention.

    No edit touches them: they stand beside the own keys in the plain attention, beside the references' in the edited.
    """

    k: Tensor
    """(B, H, N_beside, D)"""
    v: Tensor
    """(B, H, N_beside, D)"""
    bias: Tensor | None = None
    """(B or 1, N_beside): added to their logits, -inf for one that may not be read; None = all count fully."""


@dataclass(frozen=True)
class ReferenceTokens:
    """What one appearance reference offers to an attention call.

    Raises:
        ValueError: strength below 0 or not finite, or shapes that do not belong together.

    An all-zero row of `mask` cannot be noticed here without waiting for the device: check the mask once, when it comes
    in, with `readable_tokens`. If it happens nevertheless, and nothing else can be read, the output is 0, not NaN.
    """

    k: Tensor
    """(B or 1, H, N_ref, D)"""
    v: Tensor
    """(B or 1, H, N_ref, D)"""
    mask: Tensor | None = None
    """(B or 1, N_ref) in [0, 1]: which tokens may be read. 0 = never, not even in a rounding error; a soft value m
    scales the weight of the token before the softmax normalises (bias `log m`). None = all."""
    strength: float = 1.0
    """0 or above, relative to the other references (and to the own tokens in `extend`, where they count 1): the bias
    `log strength`. 0 leaves the reference out. In `replace` the strongest is read fully, whatever its strength."""
    q: Tensor | None = None
    """(B or 1, H, N_ref, D): needed by `qk_stats` only."""
    k_stats: Tensor | None = None
    """(B or 1, H, N_ref, D): the keys whose statistics `qk_stats` takes, where they are not those that are read."""

    def __post_init__(self) -> None:
        _require_range("reference strength", self.strength, 0, 1e4, "0 leaves it out, 1 is neutral")
        for name, x in (("v", self.v), ("q", self.q), ("k_stats", self.k_stats)):
            if x is not None and x.shape != self.k.shape:
                raise ValueError(
                    f"reference {name} is {tuple(x.shape)} but its k is {tuple(self.k.shape)}: "
                    "take both from the same attention call"
                )
        if self.mask is not None and (self.mask.ndim != 2 or self.mask.shape[1] != self.k.shape[2]):
            raise ValueError(
                f"reference mask is {tuple(self.mask.shape)}, needed is (B or 1, {self.k.shape[2]}): "
                "resize the mask to the grid of this attention layer"
            )


class ReadableTokens(NamedTuple):
    """A reference mask made ready: see `readable_tokens`."""

    kept: Tensor | None
    """(M,) int64: the tokens that anything may read; None = all N."""
    mask: Tensor | None
    """(B or 1, M): what remains of the mask for those tokens; None = all count fully."""


def readable_tokens(mask: Tensor, name: str = "reference mask") -> ReadableTokens:
    """Check a reference mask and split it into the tokens to keep and the soft rest.

    Call it once, when the mask comes in: it waits for the device. Tokens that no batch entry may read are best left out
    before K and V are projected (`hidden.index_select(1, kept)`): that is exact and faster than masking them.

    Args:
        mask: (B or 1, N) in [0, 1].
        name: what to call the mask in an error.

    Raises:
        ValueError: values outside [0, 1] or a batch entry that may read nothing.
    """
    if mask.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, needed is (B or 1, N): flatten its rows and columns")
    require_nonempty_mask(mask, name)
    readable = (mask > 0).any(dim=0)
    kept = None if bool(readable.all()) else readable.nonzero().flatten()
    rest = mask if kept is None else mask.index_select(1, kept)
    return ReadableTokens(kept, None if bool((rest == 1).all()) else rest)


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's own attention as an `Attend`."""
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def edited_attention(
    edit: AttentionEdit,
    own: Tokens,
    references: Sequence[ReferenceTokens] = (),
    *,
    shape: Tokens | None = None,
    matched: Tensor | None = None,
    mask_out: Tensor | None = None,
    beside: Beside | None = None,
    attend: Attend = scaled_dot_product,
) -> Tensor:
    """Self-attention of `own` as `edit` says.

    Args:
        edit: what to do.
        own: the output's tokens.
        references: appearance references; with several, their keys stand side by side, each with its mask and strength.
        shape: the shape reference's tokens, batch B or 1, as many tokens as `own`; its `v` is not used.
        matched: (B or 1, H, N, D), the values that features let each token read, for `edit.matched`.
        mask_out: (B or 1, N) in [0, 1], where the edit acts: `m * edited + (1-m) * plain`, `plain` being the attention
            of the untouched own tokens.
        beside: further keys and values that are read whatever the edit, as a prompt's in joint attention.
        attend: the host's attention. Masks and biases reach it as extra channels of q and k (D grows to the next
            multiple of 8 above D + 2, values are padded with zeros), so it stays on its fastest kernel and no N x N
            mask exists. Exact contrast alone cannot be expressed by it and runs here, in chunks of queries.

    Returns:
        (B, H, N, D) in the dtype of `own.q`. With `strength` 0: `plain_attention`, and nothing else is computed.

    Raises:
        ValueError: a reference, shape or mask is missing or does not fit; the message says which.

    Differences from the authors' code: statistics of `qk_stats` are population statistics with `std >= 1e-5`, taken
    over the readable tokens of all references together, weighted by mask and strength. MasaCtrl's masked form lets the
    outside read the *reference's* background, here the outside keeps the plain attention.
    """
    if edit.strength == 0:
        return plain_attention(own, beside, attend)
    _check_tokens(own, references, shape, mask_out, beside)
    edited = _with_matched(
        edit, own, matched, beside, attend, lambda: _edited(edit, own, references, shape, beside, attend)
    )
    if edit.strength == 1 and mask_out is None:
        return edited
    return _blend(plain_attention(own, beside, attend), edited, edit.strength, mask_out)


def plain_attention(own: Tokens, beside: Beside | None = None, attend: Attend = scaled_dot_product) -> Tensor:
    """The untouched attention of `own`, (B, H, N, D): what is read is the own tokens, and those `beside` them."""
    if beside is None:
        return attend(own.q, own.k, own.v, None)
    k, v, bias = _join([_read_beside(beside), _Source(own.k, own.v, None, 0.0)], own.q)
    return _attend_biased(own.q, k, v, bias, 1.0, attend)


def attention_weighted_adain(
    h: Tensor,
    h_ref: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    mask_ref: Tensor | None = None,
    mask_out: Tensor | None = None,
    strength: float = 1.0,
    attend: Attend = scaled_dot_product,
) -> Tensor:
    """Ctrl-X's appearance transfer (arXiv 2406.07540): each token gets the mean and deviation of what it attends to.

    `M = A h_ref`, `S = sqrt(relu(A h_ref^2 - M^2))` with `A = softmax(q.k / sqrt(D))`, then `h <- S * n(h) + M`; n
    standardises each channel over the tokens. Channels are split among the heads as they lie, head by head.

    In the authors' code `h` is what enters the self-attention layer (after the block's LayerNorm),
    `q = Wq n(h)`, `k = Wk n(h_ref)` (`statistics.standardise(..., layout="tokens")`), and q is the shape reference's
    where the shape is injected into the same layer. The layer then runs on the changed `h`.

    Args:
        h: (B, N, C), the output's hidden state.
        h_ref: (B or 1, N_ref, C), the appearance reference's.
        q: (B, H, N, D); C must be a multiple of H.
        k: (B or 1, H, N_ref, D).
        mask_ref: (B or 1, N_ref) in [0, 1], which reference tokens may be read, as in `ReferenceTokens`.
        mask_out: (B or 1, N) in [0, 1], where `h` changes.
        strength: 0 to 1; 0 returns the very tensor `h`.
        attend: the host's attention, called once with batch 2B (for A h_ref and A h_ref^2).

    Returns:
        (B, N, C) in the dtype of `h`.

    Raises:
        ValueError: strength outside [0, 1], shapes that do not fit.

    Differences from the authors' code: the reference is standardised before it is squared (the same result, without
    the cancellation that half precision suffers), the difference is taken in float32, and n divides by the population
    deviation, at least 1e-5.
    """
    _require_range("strength", strength, 0, 1, "0 is untouched, 1 as published")
    if strength == 0:
        return h
    b, heads, _, _ = q.shape
    n_ref, channels = h_ref.shape[1:]
    if h.shape != (b, q.shape[2], channels) or channels % heads or h_ref.shape[0] not in (1, b):
        raise ValueError(
            f"h {tuple(h.shape)}, h_ref {tuple(h_ref.shape)} and q {tuple(q.shape)} do not fit: "
            "needed are (B, N, C), (B or 1, N_ref, C), (B, H, N, D) with C a multiple of H"
        )
    if k.shape[0] not in (1, b) or k.shape[1:] != (heads, n_ref, q.shape[3]):
        raise ValueError(f"k is {tuple(k.shape)}, needed is (B or 1, {heads}, {n_ref}, {q.shape[3]}) with B = {b}")
    keep = None
    if mask_ref is not None:
        keep = align_mask(mask_ref, h_ref.expand(b, -1, -1), layout="tokens") > 0
        h_ref = h_ref.masked_fill(~keep, 0)
        k = k.masked_fill(~keep[:, None], 0)
    bias = None if mask_ref is None else _log_weight(mask_ref, statistics_dtype(h.dtype))
    statistics = channel_statistics(h_ref, mask_ref, layout="tokens")
    values = standardise(h_ref.to(statistics.mean.dtype), statistics=statistics, layout="tokens")
    if keep is not None:
        values = values.masked_fill(~keep, 0)
    values = values.expand(b, -1, -1).unflatten(-1, (heads, -1)).transpose(1, 2)
    moments = _attend_biased(
        torch.cat((q, q)),
        torch.cat((k.expand(b, -1, -1, -1),) * 2).to(q.dtype),
        torch.cat((values, values.square())).to(q.dtype),
        None if bias is None else torch.cat((bias.expand(b, -1),) * 2),
        1.0,
        attend,
    )
    first, second = moments.to(values.dtype).transpose(1, 2).flatten(2).chunk(2)
    # A small floor keeps the gradient of the root finite where a query reads one single token.
    deviation = (second - first.square()).clamp_min(torch.finfo(values.dtype).tiny).sqrt()
    mean, std = first * statistics.std + statistics.mean, deviation * statistics.std
    edited = standardise(h.to(values.dtype), layout="tokens") * std + mean
    return _blend(h, edited.to(h.dtype), strength, mask_out)


def reading_map(q: Tensor, k: Tensor) -> Tensor:
    """How much of the attention each key receives: the mean of `softmax(q.k / sqrt(D))` over heads and queries.

    Args:
        q: (B, H, N, D).
        k: (B, H, N_ref, D).

    Returns:
        (B, N_ref), summing to 1; memory is linear in the tokens.
    """
    dtype = statistics_dtype(q.dtype)
    total = k.new_zeros((k.shape[0], k.shape[2]), dtype=dtype)
    keys = k.to(dtype).transpose(-2, -1)
    for part in q.split(_chunk(q, keys), dim=2):
        total += ((part.to(dtype) / math.sqrt(q.shape[-1])) @ keys).softmax(dim=-1).sum(dim=(1, 2))
    return total / (q.shape[1] * q.shape[2])


def _with_matched(
    edit: AttentionEdit,
    own: Tokens,
    matched: Tensor | None,
    beside: Beside | None,
    attend: Attend,
    asked: Callable[[], Tensor],
) -> Tensor:
    """`edit.matched * matched + (1 - edit.matched) * asked()`."""
    if edit.matched == 0:
        return asked()
    if matched is None or matched.shape[0] not in (1, own.q.shape[0]) or matched.shape[1:] != own.q.shape[1:]:
        raise ValueError(
            f"edit.matched is {edit.matched}, which needs matched values as (B or 1, H, N, D) for queries "
            f"{tuple(own.q.shape)}, but got {None if matched is None else tuple(matched.shape)}"
        )
    matched = matched.to(own.q).expand_as(own.q)
    if beside is not None:
        matched = _matched_beside(own, matched, beside, attend)
    return matched if edit.matched == 1 else torch.lerp(asked(), matched, edit.matched)


def _matched_beside(own: Tokens, matched: Tensor, beside: Beside, attend: Attend) -> Tensor:
    """What lies beside is read as in the plain attention; what is left of each query's attention reads `matched`."""

    def told(v: Tensor, share: float) -> Tensor:
        """The values with one more channel, which adds up to the share of the attention that goes to them."""
        return pad(v, (0, 1), value=share)

    apart = beside._replace(v=told(beside.v, 1.0))
    k, v, bias = _join([_read_beside(apart), _Source(own.k, told(torch.zeros_like(own.v), 0.0), None, 0.0)], own.q)
    read = _attend_biased(own.q, k, v, bias, 1.0, attend)
    return read[..., :-1] + (1 - read[..., -1:]) * matched


def _edited(
    edit: AttentionEdit,
    own: Tokens,
    references: Sequence[ReferenceTokens],
    shape: Tokens | None,
    beside: Beside | None,
    attend: Attend,
) -> Tensor:
    """The edited attention at full strength."""
    q = _with_shape(own.q, edit.shape_query, "shape_query", None if shape is None else shape.q)
    k = _with_shape(own.k, edit.shape_key, "shape_key", None if shape is None else shape.k)
    reads = edit.reference in ("replace", "extend")
    if (reads or edit.qk_stats) and not references:
        wanted = f"reference={edit.reference!r}" if reads else "qk_stats=True"
        raise ValueError(f"{wanted} needs at least one reference but got none: pass references, or an edit without it")
    references = [_without_hidden(r) for r in references if r.strength > 0]
    has_own = edit.reference != "replace" or not references
    if edit.qk_stats and references:
        target_q, target_k = _reference_statistics(references, q.shape[0])
        q = apply_statistics(q, target_q, layout="tokens")
        k = apply_statistics(k, target_k, layout="tokens") if has_own else k
    sources = [] if beside is None else [_read_beside(beside)]
    sources += [_Source(k, own.v, None, 0.0)] if has_own else []
    if reads and references:
        # In `replace` nothing of the picture's own stands against the references: only their proportions count.
        shared = edit.reference_bias if has_own else -math.log(max(r.strength for r in references))
        sources += [_Source(r.k, r.v, r.mask, math.log(r.strength) + shared) for r in references]
    k, v, bias = _join(sources, q)
    if edit.contrast == 1:
        return _attend_biased(q, k, v, bias, edit.temperature, attend)
    if edit.contrast_form == "exact":
        return _attend_contrast(q, k, v, bias, edit.temperature, edit.contrast)
    attended = _attend_biased(q, k, v, bias, edit.temperature, attend)
    mean = _uniform_read(v, bias)
    return torch.lerp(mean, attended.to(mean.dtype), edit.contrast).to(q.dtype)


def _with_shape(x: Tensor, share: float, field: str, shape: Tensor | None) -> Tensor:
    """`share * shape + (1 - share) * x`."""
    if share == 0:
        return x
    if shape is None:
        raise ValueError(f"{field} is {share} but there is no shape reference: pass shape tokens or set {field} to 0")
    shape = shape.to(x.dtype).expand_as(x)
    return shape if share == 1 else torch.lerp(x, shape, share)


def _without_hidden(reference: ReferenceTokens) -> ReferenceTokens:
    """The reference with 0 for all that may not be read, so that nothing of it, NaN included, can reach the output."""
    if reference.mask is None:
        return reference
    hidden = (reference.mask <= 0)[:, None, :, None]
    seen = {name: getattr(reference, name) for name in ("k", "v", "q", "k_stats")}
    return replace(reference, **{name: x.masked_fill(hidden, 0) for name, x in seen.items() if x is not None})


def _reference_statistics(references: Sequence[ReferenceTokens], b: int) -> tuple[ChannelStatistics, ChannelStatistics]:
    """Statistics of Q and of K over all references' tokens together, weighted by mask and strength."""
    queries: list[Tensor] = []
    weights: list[Tensor] = []
    for reference in references:
        if reference.q is None:
            raise ValueError("qk_stats needs the reference's queries: pass q in ReferenceTokens, or set qk_stats=False")
        queries.append(reference.q)
        mask = reference.mask
        if mask is None:
            mask = torch.ones(1, reference.k.shape[2], device=reference.k.device)
        weights.append(mask.to(statistics_dtype(mask.dtype)) * reference.strength)
    plain = all(r.mask is None and r.strength == references[0].strength for r in references)
    weight = None if plain else _concatenate(weights, dim=1)
    query, key = (
        channel_statistics(_concatenate(x, dim=2).expand(b, -1, -1, -1), weight, layout="tokens")
        for x in (queries, [r.k if r.k_stats is None else r.k_stats for r in references])
    )
    return query, key


class _Source(NamedTuple):
    """One run of keys and values: its mask, the bias that all of them share, and what each has besides."""

    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: float
    biases: Tensor | None = None
    """(B or 1, N), of each."""


def _read_beside(beside: Beside) -> _Source:
    return _Source(beside.k, beside.v, None, 0.0, beside.bias)


def _join(sources: Sequence[_Source], q: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values (B, H, Nk, D) side by side, and their bias (B or 1, Nk), None where it is constant."""
    keys, values, biases = [], [], []
    constant = all(source.bias == sources[0].bias for source in sources)
    plain = constant and all(source.mask is None and source.biases is None for source in sources)
    for k, v, mask, shared, each in sources:
        if not plain:
            own = torch.ones(1, k.shape[2], device=k.device) if mask is None else mask
            bias = _log_weight(own, statistics_dtype(q.dtype)) + (0.0 if constant else shared)
            biases.append(bias if each is None else bias + each.to(bias.dtype))
        keys.append(k.to(q.dtype).expand(q.shape[0], -1, -1, -1))
        values.append(v.to(q.dtype).expand(q.shape[0], -1, -1, -1))
    return _concatenate(keys, dim=2), _concatenate(values, dim=2), None if plain else _concatenate(biases, dim=1)


def _attend_biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, temperature: float, attend: Attend) -> Tensor:
    """`softmax(temperature * q.k / sqrt(D) + bias) v` through the host's attention.

    The bias is two extra channels: a power of two in q; the bias, in two parts so that half precision keeps it, in k.
    """
    depth, depth_v = q.shape[-1], v.shape[-1]
    wide = max(depth, depth_v) if bias is None else -(-max(depth + 2, depth_v) // 8) * 8
    # The host divides by sqrt(wide) where the model wants sqrt(depth).
    scale = temperature * math.sqrt(wide / depth)
    q = q if scale == 1 else q * scale
    if bias is None:
        return attend(_pad(q, wide), _pad(k, wide), _pad(v, wide), None)[..., :depth_v]
    unit = 2.0 ** round(math.log2(wide) / 2)
    score = torch.where(bias.isneginf(), _MASKED_SCORE, bias * math.sqrt(wide)) / unit
    high = score.to(k.dtype)
    low = (score - high.to(score.dtype)).to(k.dtype)
    extra = torch.stack((high, low), dim=-1)[:, None].expand(*k.shape[:-1], 2)
    k = torch.cat((k, extra), dim=-1)
    q = torch.cat((q, q.new_full((*q.shape[:-1], 2), unit)), dim=-1)
    return attend(_pad(q, wide), _pad(k, wide), _pad(v, wide), None)[..., :depth_v]


def _attend_contrast(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, temperature: float, contrast: float
) -> Tensor:
    """`clip(s * (A - U) + U, 0, 1) v`, exactly, at most CONTRAST_CHUNK_BYTES of scores at a time."""
    dtype = statistics_dtype(q.dtype)
    additive = None if bias is None else _finite(bias).to(dtype).expand(q.shape[0], -1)
    scale = temperature / math.sqrt(q.shape[-1])
    out = v.new_empty((*q.shape[:3], v.shape[3]))
    # Head by head: all that is held besides the output are one head's keys and two pieces of its map.
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        keys = k[b, h].to(dtype).T
        offset = (contrast - 1) / k.shape[2] if additive is None else additive[b].softmax(dim=-1) * (contrast - 1)
        step = _chunk(q, keys)
        for piece in (slice(start, start + step) for start in range(0, q.shape[2], step)):
            scores = (q[b, h, piece].to(dtype) * scale) @ keys
            if additive is not None:
                scores = scores + additive[b]
            weights = scores.softmax(dim=-1)
            del scores
            weights = (weights * contrast).sub_(offset).clamp_(0, 1)
            out[b, h, piece] = weights.to(v.dtype) @ v[b, h]
    return out


def _chunk(q: Tensor, keys: Tensor) -> int:
    """How many queries (..., D) at a time keep their scores against keys (..., D, Nk) within the device's limit."""
    limit = CONTRAST_CHUNK_BYTES["cpu" if q.device.type == "cpu" else "accelerator"]
    return max(1, limit // max(1, math.prod(keys.shape[:-2]) * keys.shape[-1] * keys.dtype.itemsize))


def _uniform_read(v: Tensor, bias: Tensor | None) -> Tensor:
    """(B, H, 1, D): what a query that prefers nothing reads, `softmax(bias) v`, in the statistics' dtype."""
    dtype = statistics_dtype(v.dtype)
    if bias is None:
        return v.mean(dim=2, keepdim=True, dtype=dtype)
    return _finite(bias).to(dtype).softmax(dim=-1)[:, None, None] @ v.to(dtype)


def _blend(plain: Tensor, edited: Tensor, strength: float, mask: Tensor | None) -> Tensor:
    """`plain + strength * mask * (edited - plain)`; exactly one of the two where the weight is 0 or 1."""
    if mask is None:
        return edited if strength == 1 else torch.lerp(plain, edited, strength)
    weight = align_mask(mask, plain, layout="tokens").to(plain.dtype) * strength
    return torch.lerp(plain, edited, weight.expand_as(plain))


def _log_weight(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B or 1, N) bias of a mask in [0, 1]; -inf where it is 0."""
    return mask.to(dtype).clamp_min(0).log()


def _finite(bias: Tensor) -> Tensor:
    """-inf as a number whose weight is still exactly 0, so that a row without readable keys gives no NaN."""
    return bias.masked_fill(bias.isneginf(), -1e5)


def _pad(x: Tensor, width: int) -> Tensor:
    """`x` with zero channels appended up to `width`."""
    return x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))


def _concatenate(parts: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.cat` for parts whose batch size is B or 1; a single part is returned as it is."""
    if len(parts) == 1:
        return parts[0]
    b = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(b, *part.shape[1:]) for part in parts], dim=dim)


def _check_tokens(
    own: Tokens,
    references: Sequence[ReferenceTokens],
    shape: Tokens | None,
    mask_out: Tensor | None,
    beside: Beside | None,
) -> None:
    """Raise ValueError where the shapes of an attention call do not fit. Looks at shapes only."""
    b, h, _, d = own.q.shape if own.q.ndim == 4 else (0, 0, 0, 0)
    if own.q.ndim != 4 or own.k.shape != own.v.shape or own.k.shape != (b, h, own.k.shape[2], d):
        raise ValueError(
            f"own tokens have shapes {[tuple(x.shape) for x in own]}, needed is (B, H, N, D), k like v: "
            "split the heads first, and edit self-attention only"
        )
    for i, reference in enumerate(references):
        rb, rh, _, rd = reference.k.shape
        if rb not in (1, b) or (rh, rd) != (h, d):
            raise ValueError(
                f"reference {i} has keys {tuple(reference.k.shape)}, needed is (B or 1, {h}, N_ref, {d}) with B = {b}: "
                "capture it at the same attention layer of the same model"
            )
        if reference.mask is not None and reference.mask.shape[0] not in (1, b):
            raise ValueError(f"the mask of reference {i} has batch size {reference.mask.shape[0]}, allowed is 1 or {b}")
    if shape is not None:
        for name, x, y in (("q", shape.q, own.q), ("k", shape.k, own.k)):
            if x.shape[0] not in (1, b) or x.shape[1:] != y.shape[1:]:
                raise ValueError(
                    f"shape reference has {name} {tuple(x.shape)}, but the output has {tuple(y.shape)}: "
                    "resize the shape image to the output's size"
                )
    if mask_out is not None:
        align_mask(mask_out, own.q, layout="tokens")
    if beside is not None and (beside.k.shape != beside.v.shape or beside.k.shape != (b, h, beside.k.shape[2], d)):
        raise ValueError(
            f"the tokens beside have k {tuple(beside.k.shape)} and v {tuple(beside.v.shape)}, needed is "
            f"({b}, {h}, N_beside, {d}): take them from the same attention call"
        )


def _require_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, allowed are {', '.join(allowed)}")


def _require_range(name: str, value: float, low: float, high: float, hint: str) -> None:
    if not low <= value <= high:  # also true for NaN
        raise ValueError(f"{name} is {value}, allowed is {low} to {high}: {hint}")
