"""Inversions on disk: one safetensors file holds one whole; exports are what stock ComfyUI loads.

An inversion's file holds ``token.<encoder>``, ``initial.<encoder>``, ``offset.<layer>.up`` and ``.down``, ``preview``,
and everything else as JSON under the metadata key `METADATA`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .inversion import Inversion, LowRankWeights
from .model import LearningError

METADATA = "shape_and_appearance_inversion"
VERSION = 1
LORA_PREFIX = "diffusion_model."


class InversionFileError(LearningError):
    """A file that cannot be read or written as an inversion."""


def save_inversion(inversion: Inversion, path: Path) -> None:
    """Write the inversion. Whoever reads sees the old file or the new one, never half of one.

    Raises:
        InversionFileError: the file cannot be written.
    """
    tensors = {f"token.{key}": value for key, value in inversion.token.items()}
    tensors |= {f"initial.{key}": value for key, value in inversion.initial.items()}
    for name, change in inversion.offset.items():
        tensors[f"offset.{name}.up"], tensors[f"offset.{name}.down"] = change
    if inversion.preview is not None:
        tensors["preview"] = inversion.preview
    about = {
        "version": VERSION,
        "kind": inversion.kind,
        "name": inversion.name,
        "family": inversion.family,
        "settings": dict(inversion.settings),
        "pictures": inversion.pictures,
    }
    write_tensors(path, tensors, {METADATA: json.dumps(about)})


def load_inversion(path: Path) -> Inversion:
    """Read an inversion.

    Raises:
        InversionFileError: there is no such file, it is damaged, it is something else, or a newer pack wrote it.
    """
    about = read_about(path)
    _, tensors = read_tensors(path)
    try:
        token, initial, halves = (_under(tensors, prefix) for prefix in ("token.", "initial.", "offset."))
        ups = {key.removesuffix(".up") for key in halves if key.endswith(".up")}
        return Inversion(
            kind=about["kind"],
            name=about["name"],
            family=about["family"],
            token=token,
            initial=initial,
            offset={name: LowRankWeights(halves[f"{name}.up"], halves[f"{name}.down"]) for name in sorted(ups)},
            settings=about["settings"],
            pictures=about["pictures"],
            preview=tensors.get("preview"),
        )
    except KeyError as error:
        raise InversionFileError(f"{path} is a damaged inversion: it has no {error}. Learn or copy it again") from error


def read_about(path: Path) -> dict[str, Any]:
    """Kind, name, family, settings and version of an inversion's file, without its tensors; raises as above."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InversionFileError(f"the inversion {path} cannot be read: {error}") from error
    if METADATA not in metadata:
        raise InversionFileError(
            f"{path} is no inversion: stock embeddings are used as embedding:{path.stem} in a prompt, and stock LoRAs "
            "are loaded with Load LoRA"
        )
    about = json.loads(metadata[METADATA])
    if about.get("version", 0) > VERSION:
        raise InversionFileError(
            f"{path} is an inversion of version {about['version']}, this pack reads up to {VERSION}: update the pack"
        )
    return about


def embedding(inversion: Inversion) -> dict[str, Tensor]:
    """The token as a stock ComfyUI embedding: encoder ("clip_l", "clip_g") -> (n, C)."""
    return {key: value.contiguous() for key, value in inversion.token.items()}


def lora(inversion: Inversion) -> dict[str, Tensor]:
    """The offset as a stock ComfyUI LoRA; alpha is the rank, so that the change is ``up @ down``."""
    result: dict[str, Tensor] = {}
    for name, (up, down) in inversion.offset.items():
        result[f"{LORA_PREFIX}{name}.lora_up.weight"] = up.contiguous()
        result[f"{LORA_PREFIX}{name}.lora_down.weight"] = down.contiguous()
        result[f"{LORA_PREFIX}{name}.alpha"] = torch.tensor(float(down.shape[0]))
    return result


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, put in place in one step.

    Raises:
        InversionFileError: it cannot be written (no room, no permission); what was there before is still there.
    """
    ready = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    _replace(path, lambda part: save_file(ready, part, metadata=dict(metadata or {})))


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file; InversionFileError if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InversionFileError(f"{path} cannot be read: {error}") from error


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise InversionFileError(f"{path} cannot be written: {error}. Nothing that was there is lost") from error
    finally:
        partial.unlink(missing_ok=True)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
