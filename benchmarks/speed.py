"""``python -m benchmarks.speed --json FILE``: what do KV Injection and learning cost beside the plain model?

UNets of SD1.5's and SDXL's real sizes and a stack of Flux's blocks (one double, two single), with random weights,
sampled by ComfyUI; half precision, on the GPU if there is one. A step is one evaluation for the positive and the
negative prompt. Plain and patched steps alternate in one run; the ratios are medians over the pairs. On the CPU a time
is that of one thread's work, so that what else the machine does matters little.

Ratios to the plain step, for each preset (with its shape reference where the method has one):
    cached_ratio: the bank holds the references;
    first_run_ratio: it is empty, so that the references go through the model too;
    flop_floor: what the first would be, were all FLOPs equally fast and none done twice or in vain;
    flops_ratio: FLOPs counted, bank full;
    peak_memory_ratio: most memory held at once beside the weights and the bank, bank full.

Of learning on SD1.5's sizes (`training_steps`), for each kind of inversion:
    training_step_ratio: our step / the bare pass forwards and backwards of the same rows;
    diffusers_step_ratio: our step / one of diffusers' textual inversion;
    peak_memory_ratio: most memory held at once beside the weights / that of diffusers' textual inversion;
    checkpointed_peak_memory_ratio: the same with our checkpointing; both_...: with theirs, too.
"""

from __future__ import annotations

import argparse
import json
import platform
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from demo import comfy as comfy_host
from inversion_core.attention import AttentionEdit, ReferenceTokens, Tokens, edited_attention, scaled_dot_product
from inversion_core.presets import CROSS_IMAGE

from .memory import peak_bytes

Figures = dict[str, Any]

PARTS = ("attention", "contrast", "rows", "training")
CONTRAST_TOKENS = 4096
MODELS = ("sd15", "sdxl", "flux")
HEADS = {"sd15": (8, 40), "sdxl": (10, 64)}
"""Heads and channels of each, where the model's self-attention has the most tokens."""


class Size(NamedTuple):
    """How much is measured. `rows`: of a training's micro-batch."""

    latents: dict[str, int]
    pairs: int
    steps: int
    rows: int
    tiny: bool


QUICK = Size({"sd15": 16, "sdxl": 16, "flux": 16}, pairs=1, steps=10, rows=1, tiny=True)
CPU = Size({"sd15": 32, "sdxl": 24, "flux": 32}, pairs=3, steps=50, rows=1, tiny=False)
GPU = Size({"sd15": 64, "sdxl": 128, "flux": 128}, pairs=25, steps=50, rows=4, tiny=False)


def measure(file: Path, parts: tuple[str, ...], size: Size, models: tuple[str, ...] = MODELS) -> Figures:
    """The parts asked for; the file is written after each preset, for a full run takes a while."""
    from . import steps  # ComfyUI must be importable first

    dtype = torch.float16 if torch.cuda.is_available() else torch.bfloat16
    figures: Figures = {"machine": machine(dtype)}
    if "contrast" in parts:
        figures["contrast"] = {name: contrast_memory(*HEADS[name], dtype) for name in HEADS}
        _write(file, figures)
    if "rows" in parts:
        figures["rows"] = steps.rows(size.steps)
        _write(file, figures)
    if "training" in parts:
        from . import training_steps

        found = figures["training"] = {}
        size_of_it = {"latent": size.latents["sd15"], "rows": size.rows, "pairs": size.pairs, "tiny": size.tiny}
        training_steps.measure_training(found, dtype, **size_of_it, save=partial(_write, file, figures))
    if "attention" in parts:
        figures["unets"] = {}
        for name in models:
            found = figures["unets"][name] = {}
            save = partial(_write, file, figures)
            shown = {"latent": size.latents[name], "pairs": size.pairs, "tiny": size.tiny}
            steps.measure_unet(found, name, dtype, **shown, save=save)
    return figures


def machine(dtype: torch.dtype) -> Figures:
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


# --- memory of contrast -----------------------------------------------------------------------------------------------


def contrast_memory(heads: int, depth: int, dtype: torch.dtype) -> Figures:
    """Exact contrast of one guided call at 4096 tokens beside plain attention, their inputs counted in."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, CONTRAST_TOKENS, depth, generator=generator).to(device, dtype) for _ in range(3))
    own = Tokens(q, k, v)
    edit = AttentionEdit("replace", contrast=CROSS_IMAGE.steps[0].edit.contrast)
    inputs = sum(x.nbytes for x in own)
    plain = inputs + peak_bytes(lambda: scaled_dot_product(*own))
    edited = inputs + peak_bytes(lambda: edited_attention(edit, own, [ReferenceTokens(k, v)]))
    return {
        "tokens": CONTRAST_TOKENS,
        "plain_mib": plain / 2**20,
        "contrast_mib": edited / 2**20,
        "whole_map_mib": 2 * heads * CONTRAST_TOKENS**2 * q.itemsize / 2**20,
        "peak_memory_ratio": edited / plain,
    }


# --- output -----------------------------------------------------------------------------------------------------------


def tables(figures: Figures) -> str:
    """The figures as Markdown."""
    at = figures["machine"]
    lines = [f"{at['device']}, {at['dtype']}, threads: {at['threads']}, PyTorch {at['torch']}."]
    for name, unet in figures.get("unets", {}).items():
        lines += ["", f"**{name}**, latents of {unet['latent']}x{unet['latent']}", ""]
        keys = ("cached_ratio", "flop_floor", "flops_ratio", "first_run_ratio", "first_run_rows", "peak_memory_ratio")
        body = [[preset, *(f"{one[key]:.2f}" for key in keys)] for preset, one in unet["presets"].items()]
        body += [
            [rival, f"{one['cached_ratio']:.2f}", "-", "-", "-", "-", f"{one['peak_memory_ratio']:.2f}"]
            for rival, one in unet["rivals"].items()
        ]
        lines += _table(["preset", *keys], body)
    if "contrast" in figures:
        keys = ("tokens", "plain_mib", "contrast_mib", "whole_map_mib", "peak_memory_ratio")
        body = [[name, *(f"{one[key]:.4g}" for key in keys)] for name, one in figures["contrast"].items()]
        lines += ["", "**Exact contrast**", "", *_table(["attention of", *keys], body)]
    if "rows" in figures:
        found = dict(figures["rows"])
        steps = found.pop("steps")
        body = [
            [preset, *(str(one["cold"][key]) for key in ("picture", "references")), str(one["warm"]["references"])]
            for preset, one in found.items()
        ]
        head = ["preset", "picture", "references, bank cold", "references, bank warm"]
        lines += ["", f"**Rows at {steps} steps**", "", *_table(head, body)]
    if "training" in figures:
        lines += ["", *_training(figures["training"])]
    return "\n".join(lines) + "\n"


def _training(figures: Figures) -> list[str]:
    keys = ("training_step_ratio", "diffusers_step_ratio")
    memory = ("peak_memory_ratio", "checkpointed_peak_memory_ratio", "both_checkpointed_peak_memory_ratio")
    body = [[kind, *(f"{one[key]:.2f}" for key in (*keys, *memory))] for kind, one in figures["kinds"].items()]
    head = ["kind", *keys, *memory]
    size = f"latents of {figures['latent']}x{figures['latent']}, rows: {figures['rows']}"
    return [f"**Training on sd15**, {size}", "", *_table(head, body)]


def _table(head: list[str], body: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]


def _write(file: Path, figures: Figures) -> None:
    file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--markdown", type=Path, help="where to write them as tables")
    parser.add_argument("--only", choices=PARTS, help="measure this part alone")
    parser.add_argument("--model", choices=MODELS, help="measure the attention of this model alone")
    parser.add_argument("--quick", action="store_true", help="tiny UNets, few steps: does it run at all?")
    options = parser.parse_args()
    comfy_host.ensure_importable()
    from comfy.cli_args import args

    args.use_pytorch_cross_attention = True  # what ComfyUI takes on a GPU; on a CPU it would cut attention into pieces
    size = QUICK if options.quick else GPU if torch.cuda.is_available() else CPU
    torch.set_num_threads(1)
    with torch.inference_mode():
        models = (options.model,) if options.model else MODELS
        figures = measure(options.json, (options.only,) if options.only else PARTS, size, models)
    _write(options.json, figures)
    text = tables(figures)
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
