"""Where the demo's weights lie, and reading and writing them: safetensors, half precision, 25 MB together."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import replace_file

FOLDER = Path(__file__).resolve().parent / "safetensors"
AUTOENCODER = "autoencoder.safetensors"
DENOISER = "denoiser.safetensors"
DIT = "dit.safetensors"
TEXT_ENCODER = "text_encoder.safetensors"
JUDGE = "judge.safetensors"
VIT = "vit.safetensors"

CURE = "restore it with `git checkout -- demo` or by reinstalling the pack, or train it with `python -m demo.train`"


class DemoWeightsError(RuntimeError):
    """The demo's weights are missing or unreadable."""


def save_weights(name: str, state: dict[str, Tensor]) -> None:
    """Write a state dict in half precision, atomically."""
    half = {key: value.detach().cpu().half().contiguous() for key, value in state.items()}
    replace_file(FOLDER / name, lambda path: save_file(half, path))


def load_weights(name: str, folder: Path = FOLDER) -> dict[str, Tensor]:
    """Read a state dict as float32.

    Raises:
        DemoWeightsError: the file is missing or is not a whole safetensors file; the message says how to get it back.
    """
    path = folder / name
    if not path.is_file():
        raise DemoWeightsError(f"demo weights {path} are missing: {CURE}")
    try:
        return {key: value.to(torch.float32) for key, value in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise DemoWeightsError(f"demo weights {path} cannot be read ({error}): {CURE}") from error
