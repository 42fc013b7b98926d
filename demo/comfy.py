"""Finds ComfyUI and makes it importable, for scripts that build models of its classes outside its server."""

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent

# torch.accelerator would say it in one word, but ComfyUI also runs with a torch that has no such module.
_ACCELERATORS = ("cuda", "mps", "xpu")
_ASK_FOR_ACCELERATOR = (
    f"import torch; print(any(getattr(torch, name).is_available() for name in {_ACCELERATORS} if hasattr(torch, name)))"
)


class ComfyUINotFound(Exception):
    """There is no ComfyUI where one was looked for."""


@dataclass(frozen=True)
class ComfyUI:
    """A ComfyUI folder and the interpreter that runs it. `is_users`: its models are the user's, to be shown."""

    path: Path
    python: Path
    is_users: bool

    def has_accelerator(self) -> bool:
        """Whether the torch of this ComfyUI sees a GPU; without one its server must be told `--cpu`."""
        answer = subprocess.run([self.python, "-c", _ASK_FOR_ACCELERATOR], capture_output=True, text=True, check=False)
        if answer.returncode != 0:
            raise ComfyUINotFound(
                f"{self.python} cannot import torch, so it cannot run {self.path}: "
                f"give COMFYUI_PYTHON=the interpreter that ComfyUI runs with.\n{answer.stderr.strip()}"
            )
        return answer.stdout.strip() == "True"


def find_comfyui() -> ComfyUI:
    """The ComfyUI of `COMFYUI_PATH`, run by `COMFYUI_PYTHON`; else the one that `make setup` unpacked."""
    given = os.environ.get("COMFYUI_PATH")
    path = Path(given).expanduser().resolve() if given else PACK / ".venv" / "ComfyUI"
    if not (path / "main.py").is_file() or not (path / "comfy").is_dir():
        origin = "COMFYUI_PATH" if given else "no COMFYUI_PATH is given"
        raise ComfyUINotFound(
            f"no ComfyUI at {path} ({origin}): main.py and comfy/ were looked for. "
            "Run `make setup`, or give COMFYUI_PATH=the folder of your own ComfyUI."
        )
    python = os.environ.get("COMFYUI_PYTHON") if given else None
    return ComfyUI(path, Path(python).expanduser() if python else Path(sys.executable), is_users=bool(given))


def ensure_importable() -> Path:
    """Lets this process `import comfy.sd` and the like; returns ComfyUI's folder.

    The folder goes to the *end* of sys.path: it holds a module `nodes`, and the pack's own package of that name stays
    in front. Without an accelerator ComfyUI has to be told so before any other module of it is imported.
    """
    import torch

    path = find_comfyui().path
    if str(path) not in sys.path:
        sys.path.append(str(path))
    cli_args = importlib.import_module("comfy.cli_args")
    if not any(getattr(torch, name).is_available() for name in _ACCELERATORS if hasattr(torch, name)):
        cli_args.args.cpu = True
    return path
