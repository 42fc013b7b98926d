"""Where inversions are written: the user's own in models/inversions, trainings' states in the user folder."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..inversion_core.learning.files import InversionFileError, embedding, lora, save_inversion, write_tensors
from ..inversion_core.learning.inversion import Inversion
from .folders import EXTENSION, INVERSIONS, new_file


def save(inversion: Inversion, name: str, overwrite: bool, stock: bool) -> list[Path]:
    """Write the inversion, and on request a stock embedding and LoRA; returns what was written.

    Raises:
        InversionFileError: a file is there already and may not be replaced, or it cannot be written.
        ValueError: the name is empty or a path.
    """
    targets = {"inversion": INVERSIONS.new(name)}
    if stock:
        targets["embedding"] = new_file("embeddings", inversion.name)
        if inversion.offset:
            targets["lora"] = new_file("loras", name)
    there = [path for path in targets.values() if path.exists()]
    if there and not overwrite:
        raise InversionFileError(
            f"{', '.join(map(str, there))} is there already: choose another name, or switch overwrite on"
        )
    save_inversion(inversion, targets["inversion"])
    if "embedding" in targets:
        write_tensors(targets["embedding"], embedding(inversion))
    if "lora" in targets:
        write_tensors(targets["lora"], lora(inversion))
    return list(targets.values())


def unfinished(job: str) -> Path:
    """Where a training keeps its state."""
    return _state() / "unfinished" / f"{job}{EXTENSION}"


def finished(job: str) -> Path:
    """Where the result of a training is kept, so that the same inputs need not be learned twice."""
    return _state() / "learned" / f"{job}{EXTENSION}"


def _state() -> Path:
    return Path(folder_paths.get_user_directory()) / "shape_appearance"
