"""``python -m demo.train [stage ...]``: make the demo's weights from nothing, or go on where it stopped."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .. import comfy as comfy_host

STAGES = ("autoencoder", "denoiser", "judge", "vit", "dit")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.train", description=__doc__)
    parser.add_argument("stages", nargs="*", help=f"which of {', '.join(STAGES)} (default: all), or decoder")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the resumable state and samples")
    parser.add_argument("--steps", type=int, help="override the recipe's number of steps")
    parser.add_argument("--warm", action="store_true", help="start from the committed weights where no run can go on")
    parser.add_argument("--device", help="cpu, cuda or mps; default the best there is")
    parser.add_argument(
        "--compile", action="store_true", help="for the stage dit: a third faster, where torch.compile works"
    )
    options = parser.parse_args()
    unknown = [name for name in options.stages if name not in (*STAGES, "decoder")]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}: choose from {', '.join(STAGES)}")

    comfy_host.ensure_importable()
    import torch

    from .loop import train

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(allowed or 1)
    device = torch.device(options.device or best_device())
    for name in options.stages or STAGES:
        stage = _stage(name, device, options)
        if options.warm:
            stage.warm_start()
        train(stage, options.runs)


def best_device() -> str:
    """The fastest device torch can use here."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _stage(name, device, options):
    given = {} if options.steps is None else {"steps": options.steps}
    if name == "autoencoder":
        from .autoencoder import AutoencoderStage

        return AutoencoderStage(device, **given)
    if name == "decoder":
        from .autoencoder import DecoderStage

        return DecoderStage(device, **given)
    if name == "denoiser":
        from .denoiser import DenoiserStage

        return DenoiserStage(device, runs=options.runs, **given)
    if name == "judge":
        from .judge import JudgeStage

        return JudgeStage(device, **given)
    if name == "vit":
        from .vit import VitStage

        return VitStage(device, **given)
    from .dit import DitStage

    return DitStage(device, runs=options.runs, compiled=options.compile, **given)


if __name__ == "__main__":
    main()
