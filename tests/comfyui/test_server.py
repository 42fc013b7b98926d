"""The server we start and the client that talks to it, with core nodes only."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.client import ComfyClient, ExecutionFailed, ExecutionInterrupted, Progress, PromptRefused, ServerGone
from demo.comfy import PACK, ComfyUI, ComfyUINotFound, find_comfyui
from demo.server import HOST, PACK_NAME, ComfyServer, PortInUse, ServerFailed, free_port

SAVE = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "test"}}


def load_and_save(name: str) -> dict:
    return {"1": {"class_type": "LoadImage", "inputs": {"image": name}}, "2": SAVE}


def noise(channels: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, channels), np.uint8))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def stops_answering(port: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) != 0:
                return True
        time.sleep(0.1)
    return False


def test_a_graph_returns_the_very_picture_that_was_uploaded(client: ComfyClient) -> None:
    picture = noise(3)
    name = client.upload_image(picture, "noise.png")

    (result,) = client.fetch_images(client.run(load_and_save(name)), "2")

    np.testing.assert_array_equal(np.asarray(result), np.asarray(picture))


def test_a_transparent_pixel_is_a_masked_one(client: ComfyClient) -> None:
    """The convention by which the demo hands over masks, and that LoadImage keeps the colours under them."""
    picture = noise(4)
    name = client.upload_image(picture, "masked.png")
    mask = {"class_type": "MaskToImage", "inputs": {"mask": ["1", 1]}}
    shown = {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}}

    outputs = client.run({**load_and_save(name), "3": mask, "4": shown})

    (colours,), (masked,) = client.fetch_images(outputs, "2"), client.fetch_images(outputs, "4")
    np.testing.assert_array_equal(np.asarray(colours), np.asarray(picture)[..., :3])
    np.testing.assert_allclose(np.asarray(masked)[..., 0], 255 - np.asarray(picture)[..., 3], atol=1)


def test_a_picture_that_is_not_there_is_refused_with_the_node_named(client: ComfyClient) -> None:
    with pytest.raises(PromptRefused, match=r"node 1 \(LoadImage\).*missing\.png") as refused:
        client.run(load_and_save("missing.png"))
    assert list(refused.value.node_errors) == ["1"]


def test_an_unknown_node_class_is_refused_by_name(client: ComfyClient) -> None:
    with pytest.raises(PromptRefused, match="NoSuchNode"):
        client.run({"1": {"class_type": "NoSuchNode", "inputs": {}}})
    assert client.object_info("NoSuchNode") is None


def test_a_node_that_fails_is_reported_with_its_exception(client: ComfyClient, server: ComfyServer) -> None:
    (server.base / "input" / "corrupt.png").write_bytes(b"this is no picture")

    with pytest.raises(ExecutionFailed, match=r"node 1 \(LoadImage\) failed.*UnidentifiedImageError") as failure:
        client.run(load_and_save("corrupt.png"))

    assert failure.value.node_id == "1"
    assert failure.value.node_type == "LoadImage"
    assert "corrupt.png" in failure.value.message
    assert "load_image" in failure.value.traceback


def test_a_failure_does_not_spoil_the_next_run(client: ComfyClient, server: ComfyServer) -> None:
    (server.base / "input" / "broken.png").write_bytes(b"")
    with pytest.raises(ExecutionFailed):
        client.run(load_and_save("broken.png"))

    assert client.fetch_images(client.run(load_and_save(client.upload_image(noise(3), "next.png"))), "2")


def test_waiting_for_an_earlier_run_after_a_later_one(client: ComfyClient) -> None:
    """The messages that end the first run are read while the second is waited for."""
    first = client.queue(load_and_save(client.upload_image(noise(3), "first.png")))
    second = client.queue(load_and_save(client.upload_image(noise(3), "second.png")))

    assert client.wait(second)
    assert client.wait(first)


def test_interrupting_and_freeing_an_idle_server_does_no_harm(client: ComfyClient) -> None:
    client.interrupt()
    client.free()
    assert client.object_info("KSampler") is not None


def test_a_used_port_is_refused_with_the_way_out() -> None:
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortInUse, match=rf"port {port} .*PORT="), ComfyServer(port):
            pass


def test_a_server_that_cannot_start_shows_its_log() -> None:
    with (
        pytest.raises(ServerFailed, match="unrecognized arguments: --no-such-option"),
        ComfyServer(free_port(), pack=None, arguments=["--no-such-option"]),
    ):
        pass


def test_a_pack_that_cannot_be_imported_fails_the_start_and_stops_the_server(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text('raise RuntimeError("broken on purpose")\n')
    server = ComfyServer(free_port(), pack=tmp_path)

    with pytest.raises(ServerFailed, match="broken on purpose"), server:
        pass

    with pytest.raises(RuntimeError, match="not running"):
        _ = server.pid


SLOW_PACK = """
import time
import comfy.utils

class Slow:
    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "test", "run", True, ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"steps": ("INT", {"max": 1000})}}

    def run(self, steps):
        bar = comfy.utils.ProgressBar(steps)
        for step in range(steps):
            time.sleep(0.05)
            bar.update_absolute(step + 1, steps)
        return {"ui": {"steps": [steps]}}

NODE_CLASS_MAPPINGS = {"Slow": Slow}
"""


def test_progress_is_reported_and_a_run_can_be_interrupted(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text(SLOW_PACK)
    seen: list[Progress] = []

    with ComfyServer(free_port(), pack=tmp_path) as server, ComfyClient(server.url) as client:
        outputs = client.run({"7": {"class_type": "Slow", "inputs": {"steps": 5}}}, seen.append)
        endless = client.queue({"8": {"class_type": "Slow", "inputs": {"steps": 1000}}})
        time.sleep(1)
        start = time.monotonic()
        client.interrupt()
        with pytest.raises(ExecutionInterrupted, match="node 8"):
            client.wait(endless)

    every = [Progress("7", step, 5) for step in (1, 2, 3, 4, 5)]
    if os.environ.get("COMFYUI_PATH"):
        # Newer versions leave out some of what comes fast: each once and in order.
        assert seen and seen == [told for told in every if told in seen]
    else:
        assert seen == every
    assert outputs == {"7": {"steps": [5]}}
    assert time.monotonic() - start < 30


def test_an_exception_stops_the_server_and_removes_its_folders() -> None:
    running: list[tuple[int, Path, str]] = []
    with pytest.raises(KeyError, match="mine"), ComfyServer(free_port(), pack=None) as server:
        running.append((server.pid, server.base, server.url))
        assert is_running(server.pid)
        assert server.base.is_dir()
        raise KeyError("mine")

    (pid, base, url) = running[0]
    assert not is_running(pid)
    assert not base.exists()
    with ComfyClient(url) as client, pytest.raises(ServerGone, match=url):
        client.object_info("KSampler")


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL on Windows")
def test_a_server_ends_when_its_parent_is_killed() -> None:
    """Nothing can clean up after SIGKILL; the server has to notice by itself."""
    script = (
        "from demo.server import ComfyServer, free_port\n"
        "with ComfyServer(free_port(), pack=None) as server:\n"
        "    print(server.port, server.base, flush=True)\n"
        "    input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=PACK, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        port, base = parent.stdout.readline().strip().split(" ", 1)
        assert not stops_answering(int(port), seconds=0.3)
        parent.send_signal(signal.SIGKILL)

    assert stops_answering(int(port), seconds=10)
    shutil.rmtree(base)


@pytest.fixture
def users_comfyui(tmp_path: Path) -> ComfyUI:
    """A ComfyUI with models, another pack and an input picture of its user's."""
    for entry in find_comfyui().path.iterdir():
        if entry.name not in {"models", "custom_nodes", "input", "output", "temp", "user"}:
            (tmp_path / entry.name).symlink_to(entry)
    for folder in ("models/checkpoints", "models/loras", "custom_nodes/other", "input"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "models" / "checkpoints" / "users.safetensors").write_bytes(b"")
    (tmp_path / "models" / "loras" / "users_lora.safetensors").write_bytes(b"")
    (tmp_path / "input" / "private.png").write_bytes(b"")
    (tmp_path / "custom_nodes" / "other" / "__init__.py").write_text(
        f"open({str(tmp_path / 'other_was_loaded')!r}, 'w').close()\nNODE_CLASS_MAPPINGS = {{}}\n"
    )
    return ComfyUI(tmp_path, Path(sys.executable), is_users=True)


@pytest.mark.skipif(os.name == "nt", reason="the fixture needs symbolic links")
def test_of_the_users_comfyui_the_models_are_seen_and_nothing_else(users_comfyui: ComfyUI) -> None:
    before = sorted(users_comfyui.path.rglob("*"))

    with ComfyServer(free_port(), pack=None, comfyui=users_comfyui) as server, ComfyClient(server.url) as client:
        checkpoints, loras, pictures = (
            (client.object_info(node) or {})["input"]["required"][name][0]
            for node, name in (
                ("CheckpointLoaderSimple", "ckpt_name"),
                ("LoraLoader", "lora_name"),
                ("LoadImage", "image"),
            )
        )
        client.run(load_and_save(client.upload_image(noise(3), "mine.png")))

    assert checkpoints == ["users.safetensors"]
    assert loras == ["users_lora.safetensors"]
    assert pictures == []
    assert [path for path in sorted(users_comfyui.path.rglob("*")) if "__pycache__" not in path.parts] == before


def test_only_this_pack_is_loaded(server: ComfyServer) -> None:
    assert [entry.name for entry in (server.base / "custom_nodes").iterdir()] == [PACK_NAME]
    assert f"custom_nodes{os.sep}{PACK_NAME}" in server.log_text().partition("Import times for custom nodes")[2]


def test_no_comfyui_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(ComfyUINotFound, match=rf"{tmp_path}.*COMFYUI_PATH.*main\.py.*make setup"):
        find_comfyui()
