"""Every link, name and snippet of README.md is right, and its client runs against the real server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from demo import compose
from demo.comfy import PACK
from demo.graph import load_graph, with_inputs
from demo.server import ComfyServer

README = (PACK / "README.md").read_text(encoding="utf-8")
MAKEFILE = (PACK / "Makefile").read_text(encoding="utf-8")
PYPROJECT = (PACK / "pyproject.toml").read_text(encoding="utf-8")
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
COMMANDS = [
    line.partition(" # ")[0].strip() for line in PROSE.splitlines() if re.match(r" {4,}\S", line) and "|" not in line
]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
REPOSITORY = "https://github.com/shape-and-appearance/shape-appearance"
VARIABLES = set(re.findall(r"[A-Z_]{3,}", re.findall(r"^export (.*)$", MAKEFILE, re.MULTILINE)[0])) | {"PYTHON"}


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    if target.startswith("#"):
        assert target[1:] in anchors(README)
    elif target.startswith("https://arxiv.org/abs/"):
        assert re.fullmatch(r"\d{4}\.\d{5}", target.removeprefix("https://arxiv.org/abs/"))
        assert target.rpartition("/")[2] in explained_papers()
    elif target.startswith("https://"):
        assert target in {REPOSITORY, f"{REPOSITORY}/issues", "https://github.com/comfyanonymous/ComfyUI"}
    else:
        assert (PACK / target).is_file()


def explained_papers() -> set[str]:
    """Numbers of the papers that the code, the documents and the help pages name."""
    places = [*(PACK / "inversion_core").rglob("*.py"), *(PACK / "web").rglob("en.md"), *(PACK / "docs").glob("*.md")]
    return {number for path in places for number in re.findall(r"\d{4}\.\d{5}", path.read_text(encoding="utf-8"))}


def test_there_are_commands_and_one_snippet() -> None:
    """What the tests around this one rely on."""
    assert {"make demo", "make test"} <= set(COMMANDS)
    assert len(SNIPPETS) == 1 and len(SNIPPETS[0].strip().splitlines()) <= 30


def test_files_named_in_the_text_exist() -> None:
    """Such as `workflows/api/shape_and_appearance.json`."""
    rooms = "benchmarks|demo|docs|inversion_core|locales|nodes|scripts|tests|web|workflows"
    for name in re.findall(rf"`((?:{rooms})/[\w./]*)`", PROSE):
        assert (PACK / name).exists(), name


def test_variables_of_the_table_are_those_of_the_makefile() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \|", README, re.MULTILINE)
    assert set(rows) <= VARIABLES and {"COMFYUI_PATH", "CHECKPOINT", "PORT"} <= set(rows)


def test_every_node_has_its_section() -> None:
    nodes = json.loads((PACK / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    section = README.split("\n## The nodes\n")[1].split("\n## ")[0]
    named = re.findall(r"^### (.*)$", section, re.MULTILINE)
    assert sorted(named) == sorted(node["display_name"] for node in nodes.values())


def test_the_version_of_comfyui_is_that_of_the_metadata() -> None:
    (wanted,) = re.findall(r'^requires-comfyui = ">=(.*)"', PYPROJECT, re.MULTILINE)
    assert f"ComfyUI {wanted} or newer is needed" in README


def test_the_citation_is_readable() -> None:
    assert yaml.safe_load((PACK / "CITATION.cff").read_text(encoding="utf-8"))["title"]


def test_the_client_runs(server: ComfyServer, tmp_path: Path) -> None:
    job = compose.plan(compose.parse([]))
    job.shape.save(tmp_path / "shape.png")
    job.appearance.save(tmp_path / "appearance.png")
    graph = with_inputs(load_graph(compose.WORKFLOW), "KSampler", steps=2)
    (command,) = (one.split() for one in COMMANDS if one.startswith("python client.py "))
    workflow = tmp_path / command[3]
    workflow.parent.mkdir(parents=True)
    workflow.write_text(json.dumps(graph), encoding="utf-8")
    (tmp_path / "client.py").write_text(SNIPPETS[0], encoding="utf-8")
    command = [sys.executable, "client.py", server.url, *command[3:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 of 2" in done.stdout
    with Image.open(tmp_path / "result.png") as result:
        assert result.size == (128, 128)


def test_the_client_says_why_a_workflow_is_refused(server: ComfyServer, tmp_path: Path) -> None:
    job = compose.plan(compose.parse([]))
    job.shape.save(tmp_path / "shape.png")
    graph = with_inputs(load_graph(compose.WORKFLOW), "KSampler", steps=-1)
    (tmp_path / "workflow.json").write_text(json.dumps(graph), encoding="utf-8")
    (tmp_path / "client.py").write_text(SNIPPETS[0], encoding="utf-8")
    command = [sys.executable, "client.py", server.url, "workflow.json", "shape.png", "shape.png", "result.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "refused" in done.stderr and "steps" in done.stderr
    assert not (tmp_path / "result.png").exists()
