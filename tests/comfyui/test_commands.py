"""Every command of README.md is run, as it stands there, from an empty folder on.

Some things stand in for the rest of the world: the repository's address leads to this checkout; `.venv` is the one
these tests run in, so the setup is left out, which whoever runs them has behind them; the demo takes two steps. What
would run these tests again is told to stop short of it, and the model that nobody has here must be what is missed.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from demo.comfy import PACK
from demo.server import HOST, free_port

from .graphs import rendered
from .test_readme import COMMANDS, PYPROJECT, README, REPOSITORY

CLONE = [f"git clone {REPOSITORY}", "cd shape-appearance", "make demo"]
OWN_PICTURES = 'make demo SHAPE=a.png APPEARANCE=b.png PROMPT="a red vase"'
OWN_MODEL = "make demo COMFYUI_PATH=~/ComfyUI CHECKPOINT=name.safetensors SHAPE=a.png APPEARANCE=b.png"
INSTALL = [
    "cd ComfyUI/custom_nodes",
    f"git clone {REPOSITORY}",
    "python -m pip install -r shape-appearance/requirements.txt",
]
REGISTRY = "comfy node install shape-appearance"
DEVELOP = {
    "make test": ("make --dry-run test", "scripts/check.py"),
    ".venv/bin/python -m pytest tests/demo": (".venv/bin/python -m pytest tests/demo --collect-only -q", "test_world"),
    ".venv/bin/ruff check --fix && .venv/bin/ruff format": ("{}", "left unchanged"),
    ".venv/bin/python scripts/check.py -k demo": (
        ".venv/bin/python -m pytest -k demo --collect-only -q tests/demo/test_compose_options.py",
        "test_compose_options",
    ),
}
"""What is run in their place, and what it says; check.py begins with its checks, which take long."""


def shell(commands: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Bash in a folder, which is also its home, until a command fails."""
    settings = {f"url.{PACK}.insteadOf": REPOSITORY, "safe.directory": "*"}
    environment = {**os.environ, "HOME": str(folder), "PORT": str(free_port()), **variables}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    environment["GIT_CONFIG_COUNT"] = str(len(settings))
    for number, (key, value) in enumerate(settings.items()):
        environment |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    script = "\n".join(re.sub(r"^make demo", "make --old-file=setup demo", command) for command in commands)
    return subprocess.run(
        ["bash", "-ec", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone, with what is not committed yet."""
    home = tmp_path_factory.mktemp("home")
    cloned = shell(CLONE[:1], home)
    assert cloned.returncode == 0, cloned.stderr
    folder = home / "shape-appearance"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=PACK, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(lambda name: (PACK / name).is_file(), names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACK / name, folder / name)
    (folder / ".venv").symlink_to(PACK / ".venv", target_is_directory=True)
    workflow = folder / "workflows" / "api" / "shape_and_appearance.json"
    workflow.write_text(workflow.read_text(encoding="utf-8").replace('"steps": 20', '"steps": 2'), encoding="utf-8")
    for name in ("a.png", "b.png"):
        rendered(3).save(folder / name)
    return folder


def test_every_command_has_its_test() -> None:
    client = {command for command in COMMANDS if command.startswith("python client.py ")}  # in test_readme.py
    assert set(COMMANDS) == {*CLONE, OWN_PICTURES, OWN_MODEL, *INSTALL, REGISTRY, *DEVELOP, *client}


def test_from_the_clone_to_the_first_picture(checkout: Path) -> None:
    assert "\n".join(f"    {command}" for command in CLONE) in README
    done = shell(CLONE[2:], checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    (table,) = re.findall(r"leaves in `demo_output/`:\n\n((?:\|.*\n)+)", README)
    promised = re.findall(r"`(\w+\.\w+)`", "\n".join(line.split("|")[1] for line in table.splitlines()))
    assert len(promised) >= 6
    assert sorted(promised) == sorted(path.name for path in (checkout / "demo_output").iterdir())


def test_with_ones_own_pictures_there_are_no_scores(checkout: Path) -> None:
    done = shell([OWN_PICTURES], checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    left = {path.name for path in (checkout / "demo_output").iterdir()}
    assert "sheet.png" in left and "scores.json" not in left


def test_ones_own_comfyui_and_model_are_looked_for_where_the_command_says(checkout: Path) -> None:
    """There is no such model here; and a port in use ends it before a server starts."""
    (checkout / "ComfyUI").symlink_to(PACK / ".venv" / "ComfyUI", target_is_directory=True)
    with socket.socket() as used:
        used.bind((HOST, 0))
        used.listen()
        done = shell([OWN_MODEL], checkout, PORT=str(used.getsockname()[1]))
    assert done.returncode != 0
    assert f"starting ComfyUI from {(PACK / '.venv' / 'ComfyUI').resolve()}" in done.stdout
    assert f"{Path('models', 'checkpoints', 'name.safetensors')}: taking it for an SD1.5 model" in done.stdout
    assert "another program listens there" in done.stderr


def test_the_installation_by_git(tmp_path: Path) -> None:
    assert "\n".join(f"      {command}" for command in INSTALL) in README
    (tmp_path / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    done = shell([*INSTALL[:2], f"{INSTALL[2]} --no-index"], tmp_path)  # all of it is here, so nothing is fetched
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ComfyUI" / "custom_nodes" / "shape-appearance" / "__init__.py").is_file()


def test_the_registry_would_know_the_pack_by_this_name() -> None:
    assert REGISTRY.rpartition(" ")[2] == re.findall(r'^name = "(.*)"', PYPROJECT, re.MULTILINE)[0]


@pytest.mark.parametrize("command", DEVELOP)
def test_commands_for_development(checkout: Path, command: str) -> None:
    instead, said = DEVELOP[command]
    done = shell([instead.format(command)], checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stdout


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("make help", "make demo"),
        ("python -m demo.compose --help", "--appearance"),
        (".venv/bin/python scripts/help_pictures.py --help", "usage"),
    ],
)
def test_commands_within_sentences(checkout: Path, command: str, said: str) -> None:
    assert f"`{command.removesuffix(' --help')}" in README
    done = shell([command], checkout)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
