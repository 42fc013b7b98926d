"""``python -m inversion_core.learning`` on a tiny diffusers model, alone and as several processes."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.diffusers_convert
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from inversion_core.commands import learn as command
from inversion_core.commands.concepts import Concept, concepts_of, read
from inversion_core.commands.learn import Process, main
from inversion_core.hosts import diffusers_loading
from inversion_core.hosts.base import HostError
from inversion_core.hosts.comfy_inversion import apply_inversion
from inversion_core.hosts.diffusers_loading import load_pipeline
from inversion_core.learning.files import load_inversion
from inversion_core.learning.model import LearningError
from inversion_core.learning.recipes import SPENDING, Spending
from inversion_core.learning.trainer import Progress

from .text_models import whole_twins

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3


@pytest.fixture(autouse=True)
def outside_of_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False):
        yield


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPENDING, "fast", Spending(batch=2, rank=2, vectors=1, variants=3))
    for name in command.LAUNCHED:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    with torch.inference_mode(False):
        whole_twins("sd15")[0].pipe.save_pretrained(folder)
    return folder


def pictures(folder: Path, *, masks: bool = True, count: int = 1, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        mask = np.zeros((64, 64), np.uint8)
        mask[16:48, 16:48] = 255
        noise = rng.integers(0, 100, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise + (mask // 2)[..., None]).save(folder / f"{number}.png")
        if masks:
            Image.fromarray(mask).save(folder / f"{number}.mask.png")
    return folder


def arguments(model: Path, output: Path, *rest: Any, kind: str = "shape") -> list[str]:
    fixed = ["--model", model, "--output", output, "--steps", STEPS, "--quality", "fast", "--kind", kind]
    return [str(one) for one in (*fixed, *rest)]


def test_what_it_writes_is_an_inversion_that_comfyui_applies(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    folder = pictures(tmp_path / "my-star", count=2)
    assert main(arguments(model, output, folder, "--class-word", "star")) == 0
    assert [path.name for path in output.rglob("*") if path.is_file()] == ["my-star.safetensors"]
    found = load_inversion(output / "my-star.safetensors")
    assert (found.kind, found.name, found.family, found.settings["class_word"]) == ("shape", "my-star", "SD1.x", "star")
    assert len(found.settings["evaluations"]) == 2
    both, clip = whole_twins("sd15")
    patched, placed = apply_inversion(both.comfy, clip, found)
    assert len(patched.patches) == len(found.offset)
    tokens = [one for one, _ in placed.tokenize("a <my-star>")["l"][0]]
    assert any(isinstance(one, torch.Tensor) and torch.equal(one, found.token["clip_l"][0]) for one in tokens)


def test_the_same_again_is_skipped_and_something_else_needs_a_word(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    output, folder = tmp_path / "out", pictures(tmp_path / "my-star")
    assert main(arguments(model, output, folder)) == 0
    before = (output / "my-star.safetensors").read_bytes()
    caplog.clear()
    assert main(arguments(model, output, folder)) == 0
    assert "learned before from the same inputs" in caplog.text
    assert main(arguments(model, output, folder, "--seed", 1)) == 1
    assert "add --overwrite" in caplog.text
    assert (output / "my-star.safetensors").read_bytes() == before
    assert main(arguments(model, output, folder, "--framing", "as pictured", "--overwrite")) == 0
    assert (output / "my-star.safetensors").read_bytes() != before


def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pictures(tmp_path / "my-star")
    assert main(arguments(model, tmp_path / "whole", folder)) == 0
    seen: list[int] = []

    def stop(_: str, news: Progress) -> None:
        seen.append(news.done)
        if seen == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "_say", stop)
    assert main(arguments(model, tmp_path / "parts", folder)) == 130
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["unfinished"]
    assert main(arguments(model, tmp_path / "parts", folder)) == 0
    assert seen == [1, 2, 3]
    name = "my-star.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_appearance_beside_a_frozen_shape_and_a_proposed_mask(model: Path, tmp_path: Path) -> None:
    folder, output = pictures(tmp_path / "rust-1", masks=False), tmp_path / "out"
    assert main(arguments(model, output, folder, "--token", "<form>", "--whole")) == 0
    assert not list(output.glob("*.png"))
    rest = [folder, "--shape", output / "form.safetensors", "--objective", "moments"]
    assert main(arguments(model, output, *rest, kind="appearance")) == 0
    found = load_inversion(output / "rust-1.safetensors")
    assert (found.kind, found.settings["beside"]) == ("appearance", "<form>")
    with Image.open(output / "rust-1.mask.png") as shown:
        assert shown.size == (64, 64)


def test_two_processes_share_the_concepts(model: Path, tmp_path: Path) -> None:
    """Started by PyTorch's own launcher, as accelerate launch does."""
    entries = [
        {"pictures": str(pictures(tmp_path / name, seed=seed).name), "kind": kind}
        for seed, (name, kind) in enumerate([("s-1", "shape"), ("a-1", "appearance"), ("s-2", "shape")])
    ]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    output = tmp_path / "out"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    rest = ["--model", model, "--concepts", tmp_path / "list.json", "--output", output, "--steps", 1]
    done = subprocess.run(
        [*launcher, "-m", "inversion_core.learning", *map(str, rest), "--quality", "fast", "--size", "64"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "process 0 of 2 learns 2 of 3 concepts" in done.stderr
    assert "process 1 of 2 learns 1 of 3 concepts" in done.stderr
    assert sorted(path.stem for path in output.rglob("*.safetensors")) == ["a-1", "s-1", "s-2"]


def test_the_share_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    concepts = [Concept(Path(str(number)), "shape") for number in range(5)]
    assert Process.from_environment().share(concepts) == concepts
    shares = [Process(rank, 3, 0).share(concepts) for rank in range(3)]
    assert [len(one) for one in shares] == [2, 2, 1]
    assert {one.pictures for share in shares for one in share} == {one.pictures for one in concepts}
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(LearningError, match="RANK is 2 of WORLD_SIZE 1"):
        Process.from_environment()


def test_one_concept_that_fails_keeps_none_of_the_others_from_being_learned(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken, good = pictures(tmp_path / "broken-1"), pictures(tmp_path / "good-1")
    (broken / "0.png").write_bytes(b"no picture")
    assert main(arguments(model, tmp_path / "out", broken, good)) == 1
    assert "0.png cannot be read as a picture" in caplog.text
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["good-1.safetensors"]


# --- what is refused before a model is loaded -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ([], "one of both"),
        (["a", "--concepts", "b"], "one of both"),
        (["a"], "--kind shape or appearance"),
        (["a", "b", "--kind", "shape", "--token", "x"], "cannot have one --token"),
        (["a/x", "b/x", "--kind", "shape"], "two concepts are called x"),
        (["a", "--kind", "shape", "--shape", "b"], "a frozen shape is for"),
        (["a", "--kind", "shape", "--steps", "0"], "0 steps were asked for"),
        (["a", "--kind", "shape"], "nowhere is neither a file nor a folder.*--download"),
    ],
)
def test_commands_that_make_no_sense_are_refused(
    rest: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["--model", "nowhere", *rest]) == 1
    assert any(re.search(message, record.getMessage()) for record in caplog.records), caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "at least one object"),
        ('[{"pictures": "a"}]', "entry 0"),
        ('[{"pictures": "a", "kind": "shape", "colour": 1}]', "nothing else"),
        ('[{"pictures": "a", "kind": "colour"}]', "must be shape or appearance"),
    ],
)
def test_lists_of_concepts_that_make_no_sense_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(LearningError, match=message):
        concepts_of(tmp_path / "list.json")


def test_pictures_of_one_size_stay_whole_and_others_become_squares(tmp_path: Path) -> None:
    for name, sizes in {"same": [(192, 128)] * 2, "mixed": [(192, 128), (64, 300)]}.items():
        (tmp_path / name).mkdir()
        for number, size in enumerate(sizes):
            Image.new("RGB", size, (255, 0, 0)).save(tmp_path / name / f"{number}.jpg")
    assert read(tmp_path / "same", 512)[0].shape == (2, 128, 192, 3)
    found, masks = read(tmp_path / "mixed", 512)
    assert found.shape == (2, 64, 64, 3)
    assert masks is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "0.png").unlink(), "holds no picture"),
        (lambda folder: (folder / "0.png").write_bytes(b""), "cannot be read as a picture"),
        (lambda folder: Image.new("RGB", (8, 8)).save(folder / "1.png"), "1.png lack a mask such as 0.mask.png"),
        (lambda folder: Image.new("L", (8, 8)).save(folder / "0.mask.png"), "8x8, but its picture is 64x64"),
        (lambda folder: Image.new("L", (64, 64)).save(folder / "0.webp"), "differ in their endings"),
    ],
)
def test_folders_nothing_can_be_learned_from_are_refused(spoil: Any, message: str, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "a")
    spoil(folder)
    with pytest.raises(LearningError, match=message):
        read(folder, 64)
    with pytest.raises(LearningError, match="is no folder"):
        read(tmp_path / "b", 64)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_single_file_with_a_configuration_is_the_same_model(model: Path, tmp_path: Path) -> None:
    both, clip = whole_twins("sd15")
    unet, vae = both.comfy.model.diffusion_model.state_dict(), both.pipe.vae.state_dict()
    weights = {f"model.diffusion_model.{name}": value for name, value in unet.items()}
    for name, value in comfy.diffusers_convert.convert_vae_state_dict(vae).items():
        weights[f"first_stage_model.{name}"] = value
    for name, value in clip.cond_stage_model.clip_l.transformer.state_dict().items():
        weights[f"cond_stage_model.transformer.{name}"] = value
    save_file({name: value.contiguous().clone() for name, value in weights.items()}, tmp_path / "tiny.safetensors")
    with pytest.raises(HostError, match="add --config"):
        load_pipeline(str(tmp_path / "tiny.safetensors"), torch.float32)
    found = load_pipeline(str(tmp_path / "tiny.safetensors"), torch.bfloat16, config=str(model))
    assert found.unet.dtype == torch.bfloat16
    for part in ("unet", "vae", "text_encoder"):
        dtype = torch.float32 if part == "vae" else torch.bfloat16
        expected, loaded = (getattr(pipe, part).state_dict() for pipe in (both.pipe, found))
        assert all(torch.equal(value, expected[name].to(dtype)) for name, value in loaded.items())


def test_nothing_is_downloaded_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def from_pretrained(name: str, local_files_only: bool) -> Any:
        asked.append(local_files_only)
        raise OSError(f"no {name}")

    monkeypatch.setattr(diffusers_loading.DiffusionPipeline, "from_pretrained", from_pretrained)
    with pytest.raises(HostError, match="add --download"):
        load_pipeline("someone/something", torch.float32)
    assert asked == []
    for download, where in ((True, "someone/something"), (False, str(tmp_path))):
        with pytest.raises(HostError, match="cannot be loaded as a diffusers pipeline: no"):
            load_pipeline(where, torch.float32, download=download)
        assert asked.pop() is not download
