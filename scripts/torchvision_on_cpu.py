"""Lets `import torchvision` work where its C library does not match the installed torch.

`scripts/setup.py` copies this file into the virtual environment, next to a `.pth` file that imports it at every start
of the interpreter. It is never part of the pack: on a user's machine torch and torchvision match.

torchvision declares Python implementations of two operators that its C library registers. Built for CUDA, that library
cannot be loaded beside a CPU-only torch, and the import dies with "operator torchvision::nms does not exist". Declaring
the two schemas first is enough: this project calls neither operator.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept_alive: list[object] = []  # a torch Library takes its schemas with it when it is collected


class TorchvisionSchemas:
    """A meta-path finder that finds nothing: it acts once, just before torchvision is imported."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(cls)  # type: ignore[arg-type]
            spec = PathFinder.find_spec(name)
            if spec is not None and spec.submodule_search_locations and not _own_library_loads(spec):
                _register_schemas()
        return None


def _own_library_loads(spec: ModuleSpec) -> bool:
    import torch

    for folder in spec.submodule_search_locations or ():
        for library in (*Path(folder).glob("_C.*so"), *Path(folder).glob("_C.so"), *Path(folder).glob("_C*.pyd")):
            try:
                torch.ops.load_library(str(library))
            except OSError:
                continue
            return True
    return False


def _register_schemas() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _kept_alive.append(library)


sys.meta_path.insert(0, TorchvisionSchemas)  # type: ignore[arg-type]
