"""What the pack costs a ComfyUI that only starts, and what an artist reads on its nodes."""

import json
import subprocess
from typing import Any

import pytest

from demo.client import ComfyClient
from demo.comfy import PACK, find_comfyui

NODES = (
    "ShapeAppearanceLoadDemoModel",
    "ShapeAppearanceDemoPicture",
    "ShapeAppearanceEncodeReference",
    "ShapeAppearanceInvertReference",
    "ShapeAppearanceKVInjection",
    "ShapeAppearanceCustomPreset",
    "ShapeAppearanceInjectionReport",
    "ShapeAppearanceSaveReferenceCache",
    "ShapeAppearanceLoadReferenceCache",
    "ShapeAppearanceAdaINColorMatch",
    "ShapeAppearanceAdaINColorGuidance",
    "ShapeAppearanceShapeInversion",
    "ShapeAppearanceAppearanceInversion",
    "ShapeAppearanceApplyInversion",
    "ShapeAppearanceSaveInversion",
    "ShapeAppearanceLoadInversion",
    "ShapeAppearanceLoadFeatureExtractor",
    "ShapeAppearancePreviewFeatures",
    "ShapeAppearancePreviewCorrespondence",
    "ShapeAppearanceCompositionScore",
    "ShapeAppearanceCrossFeatureAttention",
    "ShapeAppearanceSelfSimilarityGuidance",
)
HEAVY = ("diffusers", "timm", "transformers")
LIMIT_SECONDS = 0.3

# Loads the pack as ComfyUI does. The heavy packages cannot be imported meanwhile, also if ComfyUI has them loaded.
SCRIPT = f"""
import asyncio, importlib.util, json, pathlib, sys, time
pack, comfyui = map(pathlib.Path, sys.argv[1:])
del sys.argv[1:]
sys.path[0] = str(comfyui)
import torch
from comfy.cli_args import args
args.cpu = not torch.cuda.is_available()
import comfy_api.latest, folder_paths
import nodes  # ComfyUI's own, and with it all that it has loaded before it turns to custom nodes
for name in {HEAVY}:
    sys.modules[name] = None
before = set(sys.modules)
start = time.process_time()
spec = importlib.util.spec_from_file_location("pack", pack / "__init__.py", submodule_search_locations=[str(pack)])
module = importlib.util.module_from_spec(spec)
sys.modules["pack"] = module
spec.loader.exec_module(module)
bare = sorted(set(sys.modules) - before)
async def nodes():
    extension = await module.comfy_entrypoint()
    return [node.define_schema().node_id for node in await extension.get_node_list()]
found = asyncio.run(nodes())
seconds = time.process_time() - start
print(json.dumps({{"seconds": seconds, "nodes": found, "bare": bare, "added": sorted(set(sys.modules) - before)}}))
"""


def loaded_once() -> dict[str, Any]:
    comfyui = find_comfyui()
    command = [str(comfyui.python), "-c", SCRIPT, str(PACK), str(comfyui.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    return loaded_once()


def test_the_entry_point_lists_the_nodes(loaded: dict[str, Any]) -> None:
    assert sorted(loaded["nodes"]) == sorted(NODES)


def test_importing_the_package_alone_imports_nothing(loaded: dict[str, Any]) -> None:
    assert loaded["bare"] == ["pack"]


def test_nothing_heavy_comes_along(loaded: dict[str, Any]) -> None:
    """That nothing of diffusers, timm and transformers is imported is shown by the script's getting to its end."""
    tops = {name.partition(".")[0] for name in loaded["added"]}
    assert tops.isdisjoint({*HEAVY, "kornia"})
    of_the_demo = {name for name in loaded["added"] if name.startswith("pack.demo")}
    assert of_the_demo <= {"pack.demo", "pack.demo.world", "pack.demo.shapes"}  # names only, and numpy


def test_the_pack_adds_little_to_the_start(loaded: dict[str, Any]) -> None:
    """The best of three: processor time, but a busy machine still slows it."""
    seconds = [loaded["seconds"]]
    while min(seconds) >= LIMIT_SECONDS and len(seconds) < 3:
        seconds.append(loaded_once()["seconds"])
    assert min(seconds) < LIMIT_SECONDS


@pytest.mark.parametrize("name", NODES)
def test_every_input_and_output_says_what_it_is(client: ComfyClient, name: str) -> None:
    info = client.object_info(name)
    assert info is not None
    assert info["description"]
    assert info["category"].split("/")[0] == "shape & appearance"
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    silent = [key for key, value in inputs.items() if len(value) < 2 or not value[1].get("tooltip")]
    assert silent == []
    assert all(info["output_tooltips"])
    assert len(info["output_tooltips"]) == len(info["output"])
