"""Checks the import contracts of pyproject.toml ([tool.importlinter]) with import-linter.

ComfyUI loads the repository as one package, whatever its folder is called, and inside it all imports are relative:
`nodes/` says `from ..inversion_core import x`. import-linter can follow that only inside a package with a name, so it
gets a copy of the pack's Python files as the package `shape_appearance`, which is what the contracts speak of.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "shape_appearance"
ROOMS = ("inversion_core", "nodes", "demo")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        copy_pack(Path(folder) / PACKAGE)
        options = ["--config", ROOT / "pyproject.toml", "--no-cache", "--no-logo"]
        command = [Path(sys.executable).with_name("lint-imports"), *options]
        environment = {**os.environ, "PYTHONPATH": folder}
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


def copy_pack(package: Path) -> None:
    """The pack's Python files, with the folders they lie in. A room that is not built yet becomes an empty package."""
    package.mkdir()
    if (ROOT / "__init__.py").is_file():
        shutil.copyfile(ROOT / "__init__.py", package / "__init__.py")
    for room in ROOMS:
        if (ROOT / room).is_dir():
            shutil.copytree(ROOT / room, package / room, ignore=_all_but_python)
        (package / room).mkdir(exist_ok=True)
    # A folder without one works in Python, but import-linter would pass over all that is in it.
    for folder in (package, *(path for path in package.rglob("*") if path.is_dir())):
        (folder / "__init__.py").touch()


def _all_but_python(folder: str, names: list[str]) -> set[str]:
    is_folder = {name for name in names if (Path(folder) / name).is_dir() and name != "__pycache__"}
    return {name for name in names if not name.endswith(".py")} - is_folder


if __name__ == "__main__":
    sys.exit(main())
