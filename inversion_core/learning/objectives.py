"""What learning minimises. Every objective is a pure function that gives one number a row, (B,), float32.

Latents are (B, C, h, w), masks (B, 1, h, w) in [0, 1], `alpha` and `sigma` (B,) of `Schedule`, queries, keys and
values (B, N, heads * D) as the projections give them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..statistics import channel_statistics
from .model import LearningError, Prediction, Schedule

MIN_SNR_GAMMA = 5.0
"""Hang et al., arXiv 2303.09556."""


# --- diffusion --------------------------------------------------------------------------------------------------------


def noised(clean: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """``alpha * clean + sigma * noise``."""
    alpha, sigma = (_rows(one, clean) for one in schedule)
    return alpha * clean + sigma * noise


def target(prediction: Prediction, clean: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """What a perfect model would give: the noise, ``alpha * noise - sigma * clean``, or ``noise - clean``."""
    alpha, sigma = (_rows(one, clean) for one in schedule)
    if prediction == "eps":
        return noise
    if prediction == "v":
        return alpha * noise - sigma * clean
    return noise - clean


def clean_estimate(prediction: Prediction, output: Tensor, noisy: Tensor, schedule: Schedule) -> Tensor:
    """The clean latent the model has in mind, from its output for a noisy one."""
    alpha, sigma = (_rows(one, noisy) for one in schedule)
    if prediction == "eps":
        return (noisy - sigma * output) / alpha
    if prediction == "v":
        return alpha * noisy - sigma * output
    return noisy - sigma * output


def min_snr(prediction: Prediction, schedule: Schedule, gamma: float = MIN_SNR_GAMMA) -> Tensor:
    """Min-SNR weights (B,) of the squared error of the model's own target.

    The paper's weight on the error of the clean estimate is min(SNR, gamma). An error e of the target is an error
    of ``sigma / alpha * e`` (eps) or ``sigma * e`` (v, flow) of the clean estimate, which gives the paper's
    min(SNR, gamma) / SNR for eps and min(SNR, gamma) / (SNR + 1) for v. For flow
    the paper has no formula; this is the same reasoning.
    """
    snr = (schedule.alpha / schedule.sigma).square()
    error = schedule.sigma / schedule.alpha if prediction == "eps" else schedule.sigma
    return snr.clamp(max=gamma) * error.square()


def masked_diffusion(output: Tensor, wanted: Tensor, mask: Tensor, outside: float) -> Tensor:
    """Mean squared error (B,) inside the mask; what lies outside counts `outside` times as much (Break-A-Scene: 0)."""
    weight = (mask + outside * (1 - mask)).expand_as(output)
    error = (output.float() - wanted.float()).square() * weight
    return error.flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1e-8)


# --- attention --------------------------------------------------------------------------------------------------------


def grid_of(tokens: int, latent: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of an attention's tokens: the latent's, halved as often as needed.

    Raises:
        LearningError: no such grid has that many tokens (another pack merges or adds tokens).
    """
    height, width = latent
    while height * width > tokens and max(height, width) > 1:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    if height * width != tokens:
        raise LearningError(
            f"an attention has {tokens} tokens, which no halving of the latent's {latent[0]}x{latent[1]} gives: "
            "disable token merging or HyperTile while learning"
        )
    return height, width


def attention_map(q: Tensor, k: Tensor, places: Tensor, heads: int) -> Tensor:
    """How much each picture token reads the marked words: (B, N), the mean over heads of the attention on them."""
    q, k = _heads(q, heads), _heads(k, heads)
    scores = (q.float() @ k.float().transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return (scores * places[:, None, None].to(scores.dtype)).sum(-1).mean(1)


def attention_on_mask(maps: Tensor, mask: Tensor) -> Tensor:
    """Break-A-Scene's attention loss (arXiv 2305.16311): MSE (B,) of the token's map over its own maximum to the mask.

    Args:
        maps: (B, N) how much each place reads the token.
        mask: (B, N) in [0, 1] on the same grid.

    Differences from the authors' code: the maximum is of each row, and the map is of one resolution chosen by the
    caller, not always 16x16.
    """
    highest = maps.amax(dim=1, keepdim=True).clamp(min=1e-8)
    return (maps / highest - mask).square().mean(dim=1)


def attention_distillation(
    q: Tensor, k: Tensor, v: Tensor, k_ref: Tensor, v_ref: Tensor, heads: int, mask: Tensor, mask_ref: Tensor
) -> Tensor:
    """Attention Distillation (arXiv 2502.20235): mean |Attn(q, k, v) - sg Attn(q, k_ref, v_ref)| inside the mask, (B,).

    Args:
        q, k, v: (B, N, heads * D) of the picture being learned.
        k_ref, v_ref: (1, M, heads * D) of the reference, fed clean.
        mask: (B, N) where the picture must look like the reference.
        mask_ref: (M,) bool, what of the reference may be read.

    Difference from the paper: there the latent is optimised against whole pictures, here token and offset are, inside
    masks; its content term |q - q_content| has no counterpart, as nothing is to be preserved.
    """
    own = F.scaled_dot_product_attention(_heads(q, heads), _heads(k, heads), _heads(v, heads))
    rows = q.shape[0]
    with torch.no_grad():
        keys, values = (_heads(x[:, mask_ref], heads).expand(rows, -1, -1, -1) for x in (k_ref, v_ref))
        wanted = F.scaled_dot_product_attention(_heads(q, heads), keys, values)
    difference = (own.float() - wanted.float()).abs().mean(dim=(1, 3))
    return (difference * mask).sum(1) / mask.sum(1).clamp(min=1e-8)


# --- appearance as statistics and features ----------------------------------------------------------------------------


def moments(clean: Tensor, mask: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Squared distance (B,) of the channels' mean and standard deviation inside the mask to a reference's (C,)."""
    found = channel_statistics(clean.float(), mask)
    means, stds = found.mean.flatten(1), found.std.flatten(1)
    return (means - mean).square().mean(1) + (stds - std).square().mean(1)


def token_mse(vectors: Tensor, wanted: Tensor) -> Tensor:
    """The founding plan's objective: squared distance of learned vectors (n, C) to one given vector (C,), a scalar."""
    return (vectors.float() - wanted.float()).square().mean()


@dataclass(frozen=True, eq=False)
class Whitening:
    """An affine map of features after which a given set of them has zero mean and unit covariance (PCA-whitening)."""

    mean: Tensor
    matrix: Tensor

    @classmethod
    def fit(cls, features: Tensor, eps: float = 1e-3) -> Whitening:
        """Fit to features (M, D), M >= 2; `eps` is added to the variances, as a share of their mean."""
        if features.ndim != 2 or features.shape[0] < 2:
            raise LearningError(f"whitening needs at least 2 features (M, D), but got {tuple(features.shape)}")
        centred = features.double() - features.double().mean(0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / (features.shape[0] - 1))
        scale = (values.clamp(min=0) + eps * values.mean()).rsqrt()
        return cls(features.float().mean(0), (vectors * scale).float())

    def __call__(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return (features.float() - self.mean) @ self.matrix


def projected(vectors: Tensor, head: nn.Module, feature: Tensor) -> Tensor:
    """1 - cosine, a scalar: mean of learned vectors (n, C), through a fitted head C -> D, against a whitened CLS (D,).

    The head must have been fitted on other tokens and frozen: learned together with one token it would explain
    anything.
    """
    return 1 - F.cosine_similarity(head(vectors.float().mean(0)), feature.float(), dim=0)


def feature_distance(features: Tensor, wanted: Tensor, schedule: Schedule) -> Tensor:
    """1 - cosine (B,) of features (B, D) of the decoded clean estimate to a reference's (D,), weighted by alpha_bar.

    At high noise the estimate is a blur that no feature describes, and its weight is next to nothing there.
    """
    cosine = F.cosine_similarity(features.float(), wanted.float()[None], dim=1)
    return alpha_bar(schedule) * (1 - cosine)


def alpha_bar(schedule: Schedule) -> Tensor:
    """Share of signal power in a noisy latent (B,), in [0, 1]."""
    signal, noise = schedule.alpha.square(), schedule.sigma.square()
    return signal / (signal + noise)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(-1, *[1] * (like.ndim - 1))


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, heads * D) -> (B, heads, N, D)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)
