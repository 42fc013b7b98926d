"""Results on disk: a picture under the state of its method, its figures under the state of the measures as well."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .methods import Result
from .state import state_of, state_of_module


class Kept:
    """What was made before. Several processes may share the work: files are put in place in one step.

    Args:
        root: the folder; made if it is not there.
        methods: by name.
        network: which of the demo's models they run on.
    """

    def __init__(self, root: Path, methods: Mapping[str, Callable[..., Any]], network: str) -> None:
        self.root = root
        self._states = {name: state_of(method, network) for name, method in methods.items()}
        self._measures = state_of_module("benchmarks.quality.measures")
        root.mkdir(parents=True, exist_ok=True)

    def result(self, method: str, seed: int) -> Result | None:
        """What the method made of a pair, its picture as saved: in 8 bits."""
        file = self._file(method, seed, "npz")
        if not file.is_file():
            return None
        with np.load(file) as found:
            told = json.loads(str(found["told"]))
            return Result(torch.from_numpy(found["picture"].astype(np.float32) / 255), **told)

    def picture(self, method: str, seed: int) -> Tensor:
        """(H, W, 3) in [0, 1]; it must be there."""
        result = self.result(method, seed)
        assert result is not None
        return result.picture

    def add(self, method: str, seed: int, result: Result) -> Result:
        """Keeps a result, and returns it as it will be read again."""
        pixels = (result.picture.clamp(0, 1) * 255).round().byte().numpy()
        told = {"rows": result.rows, "seconds": result.seconds, "untouched": result.untouched}
        partial = self.root / f"partial-{os.getpid()}.npz"
        np.savez_compressed(partial, told=np.array(json.dumps(told)), picture=pixels)
        partial.replace(self._file(method, seed, "npz"))
        return result._replace(picture=torch.from_numpy(pixels.astype(np.float32) / 255))

    def figures(self, method: str, seed: int) -> dict[str, float] | None:
        """What it was measured to be."""
        file = self._file(method, seed, f"{self._measures}.json")
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def add_figures(self, method: str, seed: int, figures: dict[str, float]) -> dict[str, float]:
        """Keeps them, and returns them."""
        partial = self.root / f"partial-{os.getpid()}.json"
        partial.write_text(json.dumps(figures), encoding="utf-8")
        partial.replace(self._file(method, seed, f"{self._measures}.json"))
        return figures

    def _file(self, method: str, seed: int, ending: str) -> Path:
        return self.root / f"{self._states[method]}-{seed}.{ending}"
