"""The oracle of the attention tests: the formulas of the papers, one head at a time, materialised, in numpy float64.

Written from the definitions and not from `inversion_core`: hard-masked tokens are removed by index, biases are weights
that multiply the exponentials.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from inversion_core.attention import AttentionEdit, Beside, ReferenceTokens, Tokens

Array = NDArray[np.float64]


def array(x: Tensor) -> Array:
    return x.detach().double().cpu().numpy()


def row(x: Tensor, b: int) -> Array:
    """Entry b of a tensor whose batch size is B or 1."""
    return array(x)[b if x.shape[0] > 1 else 0]


def softmax_weighted(logits: Array, weights: Array) -> Array:
    e = np.exp(logits - logits.max(axis=1, keepdims=True)) * weights
    return e / e.sum(axis=1, keepdims=True)


def moments(x: Array, weights: Array) -> tuple[Array, Array]:
    p = weights / weights.sum()
    mean = (x * p[:, None]).sum(axis=0)
    return mean, np.maximum(np.sqrt((((x - mean) ** 2) * p[:, None]).sum(axis=0)), 1e-5)


def match(x: Array, target: tuple[Array, Array]) -> Array:
    mean, std = moments(x, np.ones(len(x)))
    return (x - mean) / std * target[1] + target[0]


def edited_attention(
    edit: AttentionEdit,
    own: Tokens,
    references: Sequence[ReferenceTokens] = (),
    shape: Tokens | None = None,
    mask_out: Tensor | None = None,
    beside: Beside | None = None,
) -> Array:
    out = np.zeros(tuple(own.q.shape))
    for b in range(out.shape[0]):
        for h in range(out.shape[1]):
            q, k, v = (row(x, b)[h] for x in own)
            near_k, near_v, near_w = k[:0], v[:0], np.zeros(0)
            if beside is not None:
                near_k, near_v = row(beside.k, b)[h], row(beside.v, b)[h]
                near_w = np.ones(len(near_k)) if beside.bias is None else np.exp(row(beside.bias, b))
            all_k, all_w = np.concatenate([near_k, k]), np.concatenate([near_w, np.ones(len(k))])
            a = softmax_weighted(q @ all_k.T / np.sqrt(q.shape[1]), all_w)
            untouched = a @ np.concatenate([near_v, v])
            if shape is not None:
                q = (1 - edit.shape_query) * q + edit.shape_query * row(shape.q, b)[h]
                k = (1 - edit.shape_key) * k + edit.shape_key * row(shape.k, b)[h]
            parts: list[tuple[Any, Array, Array, Array]] = []
            for r in references:
                if r.strength > 0:
                    m = np.ones(r.k.shape[2]) if r.mask is None else row(r.mask, b)
                    rq = None if r.q is None else row(r.q, b)[h]
                    parts.append((rq, row(r.k, b)[h], row(r.v, b)[h], m * r.strength))
            if edit.qk_stats and parts:
                w = np.concatenate([p[3] for p in parts])
                q = match(q, moments(np.concatenate([p[0] for p in parts]), w))
                k = match(k, moments(np.concatenate([p[1] for p in parts]), w))
            keys, values, weights = [near_k, k], [near_v, v], [near_w, np.ones(len(k))]
            if edit.reference in ("replace", "extend") and parts:
                gain = np.exp(edit.reference_bias)
                if edit.reference == "replace":
                    keys, values, weights = [near_k], [near_v], [near_w]
                    gain = 1 / max(r.strength for r in references)
                for _, rk, rv, w in parts:
                    keys.append(rk)
                    values.append(rv)
                    weights.append(w * gain)
            keys, values, weights = np.concatenate(keys), np.concatenate(values), np.concatenate(weights)
            keys, values, weights = keys[weights > 0], values[weights > 0], weights[weights > 0]
            a = softmax_weighted(edit.temperature * (q @ keys.T) / np.sqrt(q.shape[1]), weights)
            u = weights / weights.sum()
            a = edit.contrast * (a - u) + u
            if edit.contrast_form == "exact":
                a = np.clip(a, 0, 1)
            share = np.ones((len(q), 1)) if mask_out is None else row(mask_out, b)[:, None]
            out[b, h] = untouched + edit.strength * share * (a @ values - untouched)
    return out


def attention_weighted_adain(
    h: Tensor,
    h_ref: Tensor,
    q: Tensor,
    k: Tensor,
    mask_ref: Tensor | None = None,
    mask_out: Tensor | None = None,
    strength: float = 1.0,
) -> Array:
    out = array(h)
    width = h.shape[2] // q.shape[1]
    for b in range(h.shape[0]):
        w = np.ones(h_ref.shape[1]) if mask_ref is None else row(mask_ref, b)
        for i in range(q.shape[1]):
            channels = slice(i * width, (i + 1) * width)
            x, values = array(h)[b][:, channels], row(h_ref, b)[:, channels][w > 0]
            keys = row(k, b)[i][w > 0]
            a = softmax_weighted(row(q, b)[i] @ keys.T / np.sqrt(q.shape[3]), w[w > 0])
            mean = a @ values
            std = np.sqrt(np.maximum(a @ values**2 - mean**2, 0))
            own_mean, own_std = moments(x, np.ones(len(x)))
            edited = std * (x - own_mean) / own_std + mean
            share = np.ones((len(x), 1)) if mask_out is None else row(mask_out, b)[:, None]
            out[b][:, channels] = x + strength * share * (edited - x)
    return out
