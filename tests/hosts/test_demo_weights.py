"""Missing, corrupt and outdated weights of the demo model."""

import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from demo.model import Network, load_demo_model
from demo.weights import AUTOENCODER, DENOISER, DIT, FOLDER, TEXT_ENCODER, DemoWeightsError

FILES = (AUTOENCODER, DENOISER, DIT, TEXT_ENCODER)
CURE = "git checkout -- demo"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        shutil.copy(FOLDER / name, tmp_path)
    return tmp_path


def message(folder: Path, name: str) -> str:
    """What loading says of a spoilt file."""
    with pytest.raises(DemoWeightsError) as error:
        load_demo_model(folder, network="DiT" if name == DIT else "UNet")
    return str(error.value)


@pytest.mark.parametrize("network", get_args(Network))
def test_whole_weights_load(folder: Path, network: Network) -> None:
    demo = load_demo_model(folder, network=network)
    assert demo.vae.encode(torch.zeros(1, 128, 128, 3)).shape == (1, 4, 16, 16)
    assert demo.model.model.latent_format.latent_channels == 4


@pytest.mark.parametrize(("network", "other"), [("UNet", DIT), ("DiT", DENOISER)])
def test_one_network_does_not_need_the_others_weights(folder: Path, network: Network, other: str) -> None:
    (folder / other).unlink()
    load_demo_model(folder, network=network)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    text = message(folder, name)
    assert str(folder / name) in text
    assert "missing" in text
    assert CURE in text


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0, 5, 1000, -1], ids=["empty", "no header", "half a header", "one byte short"])
def test_a_file_cut_short(folder: Path, name: str, kept: int) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:kept])
    text = message(folder, name)
    assert str(folder / name) in text
    assert "cannot be read" in text
    assert CURE in text


def test_something_else_under_the_name(folder: Path) -> None:
    (folder / DENOISER).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    assert "cannot be read" in message(folder, DENOISER)


def other_version(folder: Path, name: str) -> str:
    state = load_file(folder / name)
    state.pop(sorted(state)[0])
    save_file(state, folder / name)
    return message(folder, name)


@pytest.mark.parametrize("name", FILES)
def test_weights_of_another_version(folder: Path, name: str) -> None:
    text = other_version(folder, name)
    assert name in text
    assert "another version of the pack" in text


def test_weights_of_another_version_name_the_way_out(folder: Path) -> None:
    assert CURE in other_version(folder, DENOISER)
