"""Inversions on disk."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inversion_core.learning import files
from inversion_core.learning.files import InversionFileError, load_inversion, save_inversion
from inversion_core.learning.inversion import Inversion, LowRankWeights
from inversion_core.learning.model import LearningError


def inversion(**changes: object) -> Inversion:
    torch.manual_seed(0)
    values: dict = {
        "kind": "shape",
        "name": "my-chair",
        "family": "SDXL",
        "token": {"clip_l": torch.randn(2, 768), "clip_g": torch.randn(2, 1280)},
        "initial": {"clip_l": torch.randn(2, 768), "clip_g": torch.randn(2, 1280)},
        "offset": {"blocks.0.attn2.to_k": LowRankWeights(torch.randn(6, 3), torch.randn(3, 5))},
        "settings": {"class_word": "chair", "evaluations": [[0, 1.5], [10, 0.5]]},
        "pictures": "abc",
        "preview": torch.randint(0, 256, (4, 6, 3), dtype=torch.uint8),
    }
    return Inversion(**{**values, **changes})


def same(a: Inversion, b: Inversion) -> bool:
    plain = all(getattr(a, name) == getattr(b, name) for name in ("kind", "name", "family", "settings", "pictures"))
    tensors = [
        (dict(a.token), dict(b.token)),
        (dict(a.initial), dict(b.initial)),
        *[
            ({"up": change.up, "down": change.down}, {"up": b.offset[name].up, "down": b.offset[name].down})
            for name, change in a.offset.items()
        ],
    ]
    equal = all(x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x) for x, y in tensors)
    previews = (a.preview is None) == (b.preview is None)
    if a.preview is not None and b.preview is not None:
        previews = torch.equal(a.preview, b.preview)
    return plain and equal and previews and a.offset.keys() == b.offset.keys()


@pytest.mark.parametrize("changes", [{}, {"preview": None}, {"offset": {}}], ids=["whole", "no preview", "no offset"])
def test_what_is_saved_is_loaded(changes: dict, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a.safetensors"
    saved = inversion(**changes)
    save_inversion(saved, path)
    assert same(load_inversion(path), saved)
    assert [one.name for one in path.parent.iterdir()] == ["a.safetensors"]


def test_a_failed_write_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_inversion(inversion(), path)
    before = path.read_bytes()

    def full(tensors: dict, part: Path, metadata: dict) -> None:
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(InversionFileError, match=r"a\.safetensors cannot be written.*No space left"):
        save_inversion(inversion(name="other"), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_damaged_file_is_refused(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_inversion(inversion(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InversionFileError, match=r"a\.safetensors cannot be read"):
        load_inversion(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InversionFileError, match="cannot be read"):
        load_inversion(tmp_path / "a.safetensors")


def test_a_stock_embedding_is_no_inversion_and_says_what_it_is_for(tmp_path: Path) -> None:
    path = tmp_path / "rust.safetensors"
    save_file({"clip_l": torch.zeros(1, 768)}, path)
    with pytest.raises(InversionFileError, match=r"no inversion.*embedding:rust"):
        load_inversion(path)


def rewritten(path: Path, about: dict, drop: str = "") -> None:
    tensors = {name: value for name, value in load_file(path).items() if name != drop}
    save_file(tensors, path, metadata={files.METADATA: json.dumps(about)})


def test_a_file_of_a_newer_pack_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_inversion(inversion(), path)
    rewritten(path, {**files.read_about(path), "version": files.VERSION + 1})
    with pytest.raises(InversionFileError, match="update the pack"):
        load_inversion(path)


@pytest.mark.parametrize("drop", ["offset.blocks.0.attn2.to_k.down", "initial.clip_g"])
def test_a_file_that_lacks_a_tensor_is_refused(drop: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_inversion(inversion(), path)
    rewritten(path, files.read_about(path), drop)
    with pytest.raises(LearningError, match="damaged|learn it again"):
        load_inversion(path)


def test_another_family_is_refused_by_name() -> None:
    inversion().require_family("SDXL")
    with pytest.raises(LearningError, match=r"<my-chair> was learned for SDXL, but this model is SD1\.x"):
        inversion().require_family("SD1.x")


def test_strength_goes_from_the_words_to_what_was_learned() -> None:
    found = inversion()
    for key, value in found.vectors(0.0).items():
        assert torch.equal(value, found.initial[key])
    for key, value in found.vectors(1.0).items():
        assert torch.equal(value, found.token[key])
    halfway = (found.initial["clip_l"] + found.token["clip_l"]) / 2
    torch.testing.assert_close(found.vectors(0.5)["clip_l"], halfway)


def test_the_exports_are_what_stock_loaders_look_for() -> None:
    found = inversion()
    assert {key: tuple(value.shape) for key, value in files.embedding(found).items()} == {
        "clip_l": (2, 768),
        "clip_g": (2, 1280),
    }
    prefix = "diffusion_model.blocks.0.attn2.to_k"
    lora = files.lora(found)
    assert lora.keys() == {f"{prefix}.lora_up.weight", f"{prefix}.lora_down.weight", f"{prefix}.alpha"}
    # Stock loaders scale by alpha / rank.
    assert float(lora[f"{prefix}.alpha"]) == 3
    assert torch.equal(lora[f"{prefix}.lora_up.weight"], found.offset["blocks.0.attn2.to_k"].up)


def test_nonsense_is_no_inversion() -> None:
    with pytest.raises(LearningError, match="'shape' or 'appearance'"):
        inversion(kind="colour")
    with pytest.raises(LearningError, match="differ"):
        inversion(initial={"clip_l": torch.zeros(2, 768)})
