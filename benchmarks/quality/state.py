"""What a result depends on, as short digests: a change that cannot matter to a result does not drop it.

A picture depends on its network, on its method's arguments, on the code that its method's module can reach inside the
repository, and on the weights that this code loads for the network. Comments, docstrings and modules that it never
imports do not count; tables of presets and methods do not either, as their values are among the arguments.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from demo.weights import AUTOENCODER, DENOISER, DIT, FOLDER, JUDGE, TEXT_ENCODER, VIT

ROOT = Path(__file__).resolve().parent.parent.parent
TABLES = ("inversion_core/presets.py",)
"""Their assignments at module level hold arguments of methods, but for plain numbers and texts."""
WEIGHTS = {
    "demo/model.py": (DENOISER, DIT, AUTOENCODER, TEXT_ENCODER),
    "demo/vit.py": (VIT,),
    "demo/judge.py": (JUDGE,),
}
"""By module that loads them."""
NETWORKS = {"UNet": DENOISER, "DiT": DIT}
"""Of these, each network's own."""
WORDS = ("source", "differences")
"""What a preset says of itself but does not do."""


def state_of(method: Callable[..., Any], network: str) -> str:
    """A digest of all that the method's picture of a pair depends on, made with one of the demo's networks."""
    function = method.func if isinstance(method, partial) else method
    pairs = "benchmarks/quality/pairs.py"
    others = {weights for name, weights in NETWORKS.items() if name != network}
    return _digest([network, said(method), *_parts((_file(function.__module__), pairs), others)])


def state_of_module(name: str) -> str:
    """A digest of all that a module's functions depend on."""
    return _digest(_parts((_file(name),)))


def said(value: Any) -> str:
    """A value in words that are the same in every process."""
    if isinstance(value, partial):
        arguments = [said(one) for one in value.args] + [f"{k}={said(v)}" for k, v in sorted(value.keywords.items())]
        return f"{said(value.func)}({', '.join(arguments)})"
    if is_dataclass(value) and not isinstance(value, type):
        kept = [field.name for field in fields(value) if field.name not in WORDS]
        return f"{type(value).__name__}({', '.join(f'{name}={said(getattr(value, name))}' for name in kept)})"
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, tuple | list):
        return f"({', '.join(said(one) for one in value)})"
    if value is None or isinstance(value, str | int | float | bool | np.generic):
        return repr(value)
    raise TypeError(f"a method's argument is a {type(value).__name__}: say here how it is told from others")


def _parts(files: Iterable[str], without: Iterable[str] = ()) -> list[str]:
    reached = sorted(_closure(tuple(files)))
    weights = {name for file in reached for name in WEIGHTS.get(file, ())} - set(without)
    return [*(_code(file) for file in reached), *(_weights(name) for name in sorted(weights))]


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


@cache
def _weights(name: str) -> str:
    return hashlib.sha256((FOLDER / name).read_bytes()).hexdigest()


@cache
def _code(file: str) -> str:
    """The module without comments, layout and docstrings."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    if file in TABLES:
        tree.body = [node for node in tree.body if not _is_table(node)]
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [one for one in body if not _is_text(one)]
            node.body = kept or [ast.Pass()]  # pyright: ignore[reportAttributeAccessIssue]
    return f"{file}: {ast.dump(tree)}"


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_table(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign | ast.AnnAssign) and not isinstance(node.value, ast.Constant)


@cache
def _closure(files: tuple[str, ...]) -> frozenset[str]:
    seen: set[str] = set()
    waiting = set(files)
    while waiting:
        file = waiting.pop()
        seen.add(file)
        waiting |= _imports(file) - seen
    return frozenset(seen)


@cache
def _imports(file: str) -> frozenset[str]:
    """The repository's files that a module imports, at its top or inside functions."""
    found: set[str] = set()
    package = file.split("/")[:-1]
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.replace(".", "/") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = "/".join([*above, *(node.module or "").split(".")]).strip("/")
            found |= {base, *(f"{base}/{alias.name}" for alias in node.names)}
    files = {form for base in found for form in (f"{base}.py", f"{base}/__init__.py")}
    return frozenset(one for one in files if (ROOT / one).is_file())


def _file(module: str) -> str:
    path = module.replace(".", "/")
    return f"{path}.py" if (ROOT / f"{path}.py").is_file() else f"{path}/__init__.py"
