"""Steps of the plain and the patched model beside each other: time, FLOPs, memory, and rows for a whole picture."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from inversion_core.correspondence import Correspondence, Matching
from inversion_core.cross_feature import cross_feature
from inversion_core.features import Features
from inversion_core.hosts.comfy_injection import attach, last_report
from inversion_core.hosts.comfy_references import BANK
from inversion_core.injection import Injection, Window
from inversion_core.presets import PRESETS

from .arithmetic import extra_flops, flops_of
from .memory import peak_bytes
from .rivals import doubled_masactrl, materialised_cross_image
from .unets import UNet, build, sample, within_a_run

Figures = dict[str, Any]
Work = Callable[[], None]


def measure_unet(
    figures: Figures, name: str, dtype: torch.dtype, *, latent: int, pairs: int, tiny: bool, save: Work
) -> None:
    """Every preset and rival on one model, into `figures`; `save` is called after each. The rivals are of UNets."""
    unet = build(name, latent, dtype, tiny=tiny)
    figures |= {"latent": latent, "presets": {}, "rivals": {}}
    within_a_run(unet, unet.patcher, partial(measure_plain, figures))
    for method, injections in tqdm(_methods(unet).items(), desc=f"{name}: presets"):
        BANK.clear()
        patched = attach(unet.patcher, *injections)
        found = figures["presets"][method] = {}
        found["flop_floor"] = 1 + extra_flops(unet, injections) / figures["plain_flops"]
        within_a_run(unet, patched, partial(measure_preset, found, figures, pairs))
        references = {id(reference) for one in injections for reference in one.references}
        found["first_run_rows"] = last_report(patched).reference_rows / (2 * len(references))
        save()
    if unet.is_transformer:
        return
    rivals = {
        "masactrl, source in the batch": doubled_masactrl(unet.patcher, unet.appearance),
        "cross-image, whole maps": materialised_cross_image(unet.patcher, unet.appearance, unet.shape),
    }
    for rival, patched in tqdm(rivals.items(), desc=f"{name}: rivals"):
        found = figures["rivals"][rival] = {}
        within_a_run(unet, patched, partial(measure_rival, found, figures, pairs))
        save()


def _methods(unet: UNet) -> dict[str, tuple[Injection, ...]]:
    """The presets, with a shape where they take one themselves; Cross-Feature Attention of random features."""
    if unet.is_transformer:
        return {
            one.name: one.injections((unet.appearance,), unet.shape if one.shape else None, transformer=True)
            for one in PRESETS.values()
            if any(step.blocks for step in one.steps)
        }
    found = {
        one.name: one.injections((unet.appearance,), unet.shape if one.shape else None) for one in PRESETS.values()
    }
    looks = []
    for seed in (5, 6):
        tokens = torch.randn(1, 28 * 28, 384, generator=torch.Generator().manual_seed(seed))
        looks.append(Features((28, 28), tokens, tokens, tokens[:, None], None, None, None, f"random {seed}"))
    match = Correspondence(looks[0], looks[1], Matching())
    return found | {"cross-feature": (cross_feature((unet.appearance,), unet.shape, (match,), window=Window()),)}


def measure_plain(figures: Figures, plain: Work, _: Work) -> None:
    """What the ratios refer to, but for the times."""
    figures["plain_flops"] = flops_of(plain)
    figures["plain_peak_mib"] = peak_bytes(plain) / 2**20


def measure_preset(found: Figures, plain_figures: Figures, pairs: int, plain: Work, edited: Work) -> None:
    """Two of its evaluations find the bank empty: the first, which is also measured for the report, and the last."""
    edited()
    found["flops_ratio"] = flops_of(edited) / plain_figures["plain_flops"]
    found["peak_memory_ratio"] = peak_bytes(edited) / 2**20 / plain_figures["plain_peak_mib"]
    found["bank_mib"] = (BANK.stats.device_bytes + BANK.stats.ram_bytes) / 2**20
    times = [(seconds(plain), seconds(edited)) for _ in range(pairs)]
    found["plain_ms"] = 1000 * median(one for one, _ in times)
    found["cached_ratio"] = median(cached / one for one, cached in times)
    BANK.clear()
    found["first_run_ratio"] = seconds(edited) * 1000 / found["plain_ms"]


def measure_rival(found: Figures, plain_figures: Figures, pairs: int, plain: Work, edited: Work) -> None:
    found["peak_memory_ratio"] = peak_bytes(edited) / 2**20 / plain_figures["plain_peak_mib"]
    times = [(seconds(plain), seconds(edited)) for _ in range(pairs)]
    found["cached_ratio"] = median(rival / one for one, rival in times)


def seconds(work: Work) -> float:
    """How long it takes, by `clock`. The work has ended when it returns."""
    start = clock()
    work()
    return clock() - start


def clock() -> float:
    """Seconds: with a GPU those on the wall, on the CPU those that this process worked."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def rows(steps: int) -> Figures:
    """Rows through the model for one guided picture, as the host counts them; they depend on the schedule alone."""
    unet = build("sd15", 8, torch.float32, tiny=True)
    figures: Figures = {"steps": steps}
    for preset in tqdm(PRESETS.values(), desc="rows"):
        injections = preset.injections((unet.appearance,), unet.shape if preset.shape else None)
        patched = attach(unet.patcher, *injections)
        found = figures[preset.name] = {}
        BANK.clear()
        for bank in ("cold", "warm"):
            sample(unet, patched, steps, cfg=5.0)
            report = last_report(patched)
            found[bank] = {"picture": report.rows, "references": report.reference_rows}
    return figures
