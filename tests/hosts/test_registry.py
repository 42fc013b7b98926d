"""What the ComfyUI registry takes: its metadata, and an archive that holds what the nodes need and nothing else.

comfy-cli packs the files git tracks, less those that .comfyignore names.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from demo.comfy import PACK, find_comfyui
from scripts import artwork

RAW = "https://raw.githubusercontent.com/shape-and-appearance/shape-appearance/main/"
OPTIONAL = {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "requirements.txt"}
PROVIDED = {"torch", "torchvision", "torchaudio", "aiohttp", "comfyui-frontend-package"}


@cache
def metadata() -> Any:
    """What ComfyUI's own parser reads."""
    return importlib.import_module("comfy_config.config_parser").extract_node_configuration(str(PACK))


@cache
def raw() -> dict[str, Any]:
    parser = importlib.import_module("comfy_config.config_parser")
    return parser.load_pyproject_settings(PACK / "pyproject.toml").tool["comfy"]


def tracked(*options: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", "-z", *options], cwd=PACK, capture_output=True, text=True, check=True)
    return set(filter(None, listed.stdout.split("\0")))


@cache
def archive() -> set[str]:
    files = tracked()
    assert files
    return files - tracked("--cached", "--ignored", "--exclude-from=.comfyignore")


def imported(path: str) -> set[str]:
    """The files of the pack that a file imports, at its top or inside functions."""
    tree = ast.parse((PACK / path).read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = Path(path).parents[node.level - 1]
            base = folder.joinpath(*(node.module or "").split("."))
            found |= {base, *(base / name.name for name in node.names)}
    files = {form for base in found for form in (f"{base.as_posix()}.py", f"{(base / '__init__.py').as_posix()}")}
    parents = {(parent / "__init__.py").as_posix() for file in files for parent in Path(file).parents}
    return {name for name in files | parents if (PACK / name).is_file()}


def reached() -> set[str]:
    """Every Python file that the pack can come to import, from its `__init__.py` on."""
    seen: set[str] = set()
    waiting = {"__init__.py"}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting |= imported(name) - seen
    return seen


def test_the_metadata_is_what_the_registry_asks_for() -> None:
    project, comfy = metadata().project, metadata().tool_comfy
    assert re.fullmatch(r"[a-z]([-_.]?[a-z0-9]+)*", project.name) and len(project.name) < 100
    assert "comfyui" not in project.name
    assert re.fullmatch(r"\d+\.\d+\.\d+", project.version)
    assert project.description
    assert project.license.file and (PACK / project.license.file).is_file()
    assert project.urls.repository.startswith("https://github.com/")
    assert project.urls.documentation and project.urls.issues
    assert project.supported_os == ["OS Independent"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", project.supported_comfyui_version)
    assert comfy.publisher_id and comfy.display_name == "Shape & Appearance"


def test_the_packages_are_those_that_comfyui_manager_installs_and_none_of_comfyuis_own() -> None:
    lines = (PACK / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == metadata().project.dependencies
    for wanted in metadata().project.dependencies:
        name, bounds = re.fullmatch(r"([\w-]+)(.*)", wanted).groups()  # pyright: ignore[reportOptionalMemberAccess]
        assert name not in PROVIDED
        assert re.fullmatch(r"(>=[\d.]+)?", bounds), f"{wanted} could take a version away that ComfyUI needs"


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((PACK / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == metadata().project.version
    assert citation["repository-code"] == metadata().project.urls.repository
    assert "## [Unreleased]" in (PACK / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("key", "draw"), [("Icon", artwork.icon), ("Banner", artwork.banner)])
def test_the_pictures_are_those_that_the_script_draws(key: str, draw: Any) -> None:
    assert raw()[key].startswith(RAW)
    committed, drawn = Image.open(PACK / raw()[key].removeprefix(RAW)), draw()
    assert (committed.size, committed.mode) == (drawn.size, drawn.mode)
    # Versions of FreeType and Pillow may differ by a shade along the edges.
    assert np.abs(np.asarray(committed, np.float32) - np.asarray(drawn, np.float32)).mean() < 1


def test_the_pictures_have_the_sizes_that_the_registry_asks_for() -> None:
    width, height = artwork.icon().size
    assert width <= 800 and height <= 400
    width, height = artwork.banner().size
    assert width * 9 == height * 21


def test_the_archive_holds_every_file_that_the_pack_can_import() -> None:
    assert reached() <= archive()
    assert "inversion_core/hosts/comfy_unet.py" in reached() and "demo/text.py" in reached()


def test_the_archive_holds_nothing_else() -> None:
    """The core is there as a whole, as others may use it; of the demo only what makes its model."""
    rooms = {"inversion_core/", "locales/", "nodes/", "web/", "workflows/"}
    kept = {name for name in archive() if not any(name.startswith(room) for room in rooms)}
    python = {name for name in kept if name.endswith(".py")}
    assert python <= reached()
    parts = ("autoencoder", "denoiser", "dit", "text_encoder", "vit")
    weights = {f"demo/safetensors/{name}.safetensors" for name in parts}
    words = {f"demo/tokenizer/{name}" for name in ("merges.txt", "tokenizer_config.json", "vocab.json")}
    docs = {f"docs/{path.name}" for path in (PACK / "docs").glob("*.md")}
    assert kept - python == weights | words | docs | OPTIONAL


def test_the_archive_is_small() -> None:
    assert sum((PACK / name).stat().st_size for name in archive()) < 32 * 2**20


def test_the_archive_does_nothing_that_the_registry_forbids() -> None:
    """No eval and exec, no processes (so no pip at run time). Ruff's S102 and S307 say so too, for all files."""
    for name in sorted(archive()):
        if not name.endswith(".py"):
            continue
        for node in ast.walk(ast.parse((PACK / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not modules & {"subprocess", "pip", "pickle"}, name
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "os.system", "os.popen"}, name


# Loads what lies in the folder as ComfyUI loads a custom node, and makes the demo's model of it.
SMOKE = """
import asyncio, importlib.util, json, pathlib, sys
pack, comfyui = map(pathlib.Path, sys.argv[1:])
del sys.argv[1:]
sys.path[0] = str(comfyui)
from comfy.cli_args import args
import torch
args.cpu = not torch.cuda.is_available()
spec = importlib.util.spec_from_file_location("pack", pack / "__init__.py", submodule_search_locations=[str(pack)])
module = sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
async def nodes():
    return await (await module.comfy_entrypoint()).get_node_list()
found = {node.GET_SCHEMA().node_id: node for node in asyncio.run(nodes())}
model, clip, vae = found["ShapeAppearanceLoadDemoModel"].execute().args
clip.encode_from_tokens(clip.tokenize("a red striped star on sky"))
print(json.dumps({"nodes": list(found), "web": (pack / module.WEB_DIRECTORY / "docs").is_dir()}))
"""


def test_the_archive_works_by_itself(tmp_path: Path) -> None:
    for name in archive():
        (tmp_path / "pack" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACK / name, tmp_path / "pack" / name)
    (tmp_path / "smoke.py").write_text(SMOKE, encoding="utf-8")
    comfyui = find_comfyui()
    command = [sys.executable, tmp_path / "smoke.py", tmp_path / "pack", comfyui.path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    translated = json.loads((PACK / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert sorted(said["nodes"]) == sorted(translated)
    assert said["web"]


def test_issue_forms_are_what_github_reads() -> None:
    folder = PACK / ".github" / "ISSUE_TEMPLATE"
    forms = sorted(path for path in folder.glob("*.yml") if path.name != "config.yml")
    assert forms
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert form["name"] and form["description"]
        ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
        assert len(ids) == len(set(ids))
        for part in form["body"]:
            assert part["type"] in {"checkboxes", "dropdown", "input", "markdown", "textarea"}
            assert part["attributes"]["label"]
    assert yaml.safe_load((folder / "config.yml").read_text(encoding="utf-8"))["blank_issues_enabled"] in (True, False)
