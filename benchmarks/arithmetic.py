"""FLOPs: what a step of the model takes, and the least that an edit of its self-attentions needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from inversion_core.attention import AttentionEdit
from inversion_core.hosts.comfy_injection import chosen, sites_of
from inversion_core.injection import Injection
from inversion_core.sites import Site, select

from .unets import UNet


def flops_of(work: Callable[[], None]) -> int:
    """What PyTorch counts: matrix products, convolutions, attention; two for a multiplication with its addition."""
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the one attention that PyTorch leaves out

    def count(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    with FlopCounterMode(display=False, custom_mapping={on_cpu: count}) as counter:
        work()
    return counter.get_total_flops()


def extra_flops(unet: UNet, injections: Sequence[Injection]) -> int:
    """FLOPs of a guided step with a warm bank, less those of a plain one, were nothing done twice or in vain.

    What is the same for all rows of the batch, such as a reference's keys, counts once. Below zero where an edit
    needs less than the attention that it replaces. The injections' sites are disjoint, their references of the
    output's size, their masks none, their strengths 1, what features decide all or nothing.
    """
    if unet.is_transformer:
        return sum(_joint(unet, one) for one in injections)
    total = 0
    sites = sites_of(unet.patcher)
    widths = _widths(unet)
    for one in injections:
        appearance = select(one.sites, sites) if one.appearance else frozenset()
        shape = select(one.shape_sites or one.sites, sites) if one.shape is not None else frozenset()
        for site in sites:
            edit = one.at(site.name in appearance, site.name in shape)
            if edit is not None:
                total += _extra(
                    edit, (unet.latent // site.scale) ** 2, widths[site], 1 if one.rows == "positive" else 2
                )
    return total


def _extra(edit: AttentionEdit, n: int, width: int, rows: int) -> int:
    """For one reference of n tokens and the edited rows of n tokens of one self-attention."""

    def projected(tokens: int) -> int:
        return 2 * tokens * width * width

    def attended(rows: int, keys: int) -> int:
        return 4 * rows * n * keys * width

    plain = 3 * projected(rows * n) + attended(rows, n)
    if edit.matched == 1:  # no attention at all: one projection of the values that features chose
        return projected(n) - plain
    own_queries, own_keys = edit.shape_query < 1 or edit.qk_stats, edit.reference != "replace"
    queries = projected((rows * n if own_queries else 0) + (n if edit.shape_query > 0 else 0))
    queries += projected(n) if edit.qk_stats else 0
    keys = projected((rows * n if own_keys and edit.shape_key < 1 else 0) + (n if edit.shape_key > 0 else 0))
    values = projected(rows * n if own_keys else 0)
    reads = edit.reference in ("replace", "extend")
    keys += projected(n) if reads or edit.qk_stats else 0
    values += projected(n) if reads else 0
    same_for_all = not own_queries and not own_keys
    attention = attended(1 if same_for_all else rows, (n if own_keys else 0) + (n if reads else 0))
    if edit.reference == "normalise":
        asked = 1 if edit.shape_query == 1 else rows
        keys += projected(n)
        queries += projected(asked * n)
        attention += 2 * attended(asked, n)
    return queries + keys + values + attention - plain


def _joint(unet: UNet, injection: Injection) -> int:
    """An injection on a transformer: everything is projected before, and only what the picture's queries read differs.

    They read the prompt and the reference, and where the edit keeps them the picture's own keys. What every prompt
    token asks of everything stays.
    """
    model = unet.patcher.model.diffusion_model
    edit, rows = injection.edit, 1 if injection.rows == "positive" else 2
    reads = {"replace": 0, "extend": 1}[edit.reference]  # times the picture's tokens, more than without the edit
    total = 0
    for site in sites_of(unet.patcher):
        n = (unet.latent // site.scale) ** 2
        if site.name in chosen(unet.patcher, injection.sites):
            total += 4 * rows * n * reads * n * model.hidden_size
    return total


def _widths(unet: UNet) -> dict[Site, int]:
    """Channels of each self-attention."""
    model = unet.patcher.model.diffusion_model
    layers = [module.attn1 for module in model.modules() if hasattr(module, "attn1")]
    widths = [layer.heads * layer.dim_head for layer in layers]
    return dict(zip(sites_of(unet.patcher), widths, strict=True))
