"""Load Demo Model in a pack whose weights are damaged or gone, as the artist meets it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.client import ComfyClient, ExecutionFailed
from demo.comfy import PACK
from demo.server import ComfyServer, free_port

from .graphs import pictures, text_to_image

WEIGHTS = Path("demo", "safetensors")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what of the pack a server loads."""
    copy = tmp_path_factory.mktemp("packs") / "copy"
    for name in ("nodes", "inversion_core", "demo"):
        shutil.copytree(PACK / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PACK / "__init__.py", copy)
    return copy


@pytest.fixture(scope="module")
def server(pack: Path) -> Iterator[ComfyServer]:
    with ComfyServer(free_port(), pack=pack) as running:
        yield running


def test_bad_weights_are_named_with_the_way_out_and_good_ones_work_at_once(client: ComfyClient, pack: Path) -> None:
    file = pack / WEIGHTS / "denoiser.safetensors"
    truncated = file.read_bytes()[:1000]
    for spoil, word in ((lambda: file.write_bytes(truncated), "cannot be read"), (file.unlink, "missing")):
        spoil()
        with pytest.raises(ExecutionFailed) as failure:
            client.run(text_to_image(steps=1))
        assert failure.value.node_id == "demo"
        assert word in failure.value.message
        assert "denoiser.safetensors" in failure.value.message
        assert "git checkout" in failure.value.message

    shutil.copy(PACK / WEIGHTS / file.name, file)
    assert pictures(client, text_to_image(steps=1)).shape == (1, 128, 128, 3)
