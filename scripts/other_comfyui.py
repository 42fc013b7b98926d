"""Makes an environment for another version of ComfyUI, in which the tests of the server and of the page can run.

    .venv/bin/python scripts/other_comfyui.py ~/ComfyUI-0.3.60
    .venv/bin/python scripts/other_comfyui.py ~/ComfyUI comfyui-frontend-package==1.58.1   # with another page

It lies in `.venv/other/<version>` and borrows all it can from `.venv`; only what that ComfyUI wants in other versions,
such as its page, is installed there. The command that runs the tests is printed at the end.
"""

# ruff: noqa: E402
from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.setup import CONSTRAINTS, VENV, comfyui_requirements, say

# Newer versions do not start without torchaudio, and its libraries do not load beside a CPU-only torch. Nothing here
# makes a sound.
SILENT = {"__init__": "", "functional": "", "transforms": "MelScale = None\n"}


def main(arguments: list[str]) -> int:
    comfyui = Path(arguments[0]).expanduser().resolve()
    found = re.search(r'__version__ = "(.*)"', (comfyui / "comfyui_version.py").read_text(encoding="utf-8"))
    if found is None:
        raise SystemExit(f"{comfyui}/comfyui_version.py names no version")
    home = VENV.resolve() / "other" / found[1]
    python = make(home)
    install(python, [*comfyui_requirements(comfyui), *arguments[1:]])
    say(f"ready: {home}")
    print(f"COMFYUI_PATH={comfyui} {python} -m pytest tests/browser tests/comfyui")
    return 0


def make(home: Path) -> Path:
    """The interpreter of an environment whose packages come before those of `.venv`, but are few."""
    venv.create(home, clear=True)
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    own = packages_of(python)
    (own / "borrowed.pth").write_text(f"import site; site.addsitedir({str(packages_of(Path(sys.executable)))!r})\n")
    (own / "torchaudio").mkdir()
    for name, text in SILENT.items():
        (own / "torchaudio" / f"{name}.py").write_text(text)
    return python


def packages_of(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())


def install(python: Path, wanted: list[str]) -> None:
    """A later wish for a package replaces an earlier one."""
    by_name = {re.split(r"[^\w.-]", one)[0]: one for one in wanted}
    command = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*command, "--constraint", CONSTRAINTS, *by_name.values()], check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
