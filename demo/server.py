"""A ComfyUI server of our own: headless, with this pack and no other, in folders that are gone afterwards."""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from .comfy import PACK, ComfyUI, find_comfyui

HOST = "127.0.0.1"
PACK_NAME = "shape-appearance"

_LOG_TAIL = 30
_STOP_SECONDS = 10.0
_LAUNCHER = Path(__file__).with_name("_launch.py")


class PortInUse(Exception):
    """Another program listens on the port."""


class ServerFailed(Exception):
    """The server did not start, or stopped; the message ends with the end of its log."""


class ComfyServer:
    """Context manager: a running server at `url`, stopped on the way out, whatever the way.

    The server sees none of the user's folders but, with `COMFYUI_PATH`, the models. `log` may name a file to keep;
    by default the log goes with the other temporary files. `arguments` are added to those of ComfyUI's main.py.
    `pack` is the folder to load as the only custom node; None loads none.
    """

    def __init__(
        self,
        port: int,
        *,
        arguments: Sequence[str] = (),
        log: Path | None = None,
        pack: Path | None = PACK,
        comfyui: ComfyUI | None = None,
        start_seconds: float = 300.0,
    ) -> None:
        self.port = port
        self.url = f"http://{HOST}:{port}"
        self._arguments = list(arguments)
        self._log = log
        self._pack = pack
        self._comfyui = comfyui
        self._start_seconds = start_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._base: Path | None = None

    def __enter__(self) -> "ComfyServer":
        try:
            self._start()
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def base(self) -> Path:
        """The folder that holds this server's input, output, temp and user folders."""
        if self._base is None:
            raise RuntimeError("the server is not running: use it as `with ComfyServer(port) as server:`")
        return self._base

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("the server is not running: use it as `with ComfyServer(port) as server:`")
        return self._process.pid

    def log_text(self) -> str:
        path = self._log_path()
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def log_tail(self) -> str:
        return "\n".join(self.log_text().splitlines()[-_LOG_TAIL:])

    def stop(self) -> None:
        """Ends the server and removes its folders; does nothing the second time."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)
        base, self._base = self._base, None
        if base is not None:
            shutil.rmtree(base, ignore_errors=True)

    def _log_path(self) -> Path:
        return self._log or self.base / "server.log"

    def _start(self) -> None:
        refuse_used_port(self.port)
        comfyui = self._comfyui or find_comfyui()
        # Resolved, since ComfyUI compares paths and the temporary folder is a link on some systems.
        self._base = Path(tempfile.mkdtemp(prefix="shape-appearance-")).resolve()
        for name in ("custom_nodes", "input", "output", "temp", "user", "models"):
            (self._base / name).mkdir()
        command = [comfyui.python, _LAUNCHER, comfyui.path, *self._base_arguments(comfyui), *self._arguments]
        # Python buffers a log that is no terminal; a crash would lose its last lines.
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with self._log_path().open("wb") as log:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,  # never written to: see _launch.py
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=comfyui.path,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches us alone, and we end the server in our own time
            )

    def _base_arguments(self, comfyui: ComfyUI) -> list[str]:
        base = self.base
        arguments = ["--listen", HOST, "--port", str(self.port), "--base-directory", str(base)]
        # Its default lies in ComfyUI's own folder, whatever the base directory is.
        arguments += ["--database-url", f"sqlite:///{(base / 'user' / 'comfyui.db').as_posix()}"]
        arguments += ["--disable-auto-launch", "--disable-api-nodes", "--disable-all-custom-nodes"]
        if not comfyui.has_accelerator():
            arguments.append("--cpu")
        folders: dict[str, dict[str, str]] = {}
        if self._pack is not None:
            name, search = _offer_pack(self._pack, base / "custom_nodes")
            arguments += ["--whitelist-custom-nodes", name]
            if search is not None:
                folders["pack"] = {"custom_nodes": str(search)}
        if comfyui.is_users:
            folders["models"] = _model_folders(comfyui.path / "models")
        if folders:
            config = base / "extra_model_paths.yaml"
            config.write_text(json.dumps(folders), encoding="utf-8")  # JSON is YAML
            arguments += ["--extra-model-paths-config", str(config)]
        return arguments

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + self._start_seconds
        while not self._answers():
            if self._process is None or self._process.poll() is not None:
                raise ServerFailed(f"ComfyUI ended while it was starting. The end of its log:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServerFailed(
                    f"ComfyUI did not answer at {self.url} within {self._start_seconds:.0f} s. "
                    f"The end of its log:\n{self.log_tail()}"
                )
            time.sleep(0.2)
        if "(IMPORT FAILED)" in self.log_text():
            raise ServerFailed(f"ComfyUI could not load {self._pack}. The end of its log:\n{self.log_tail()}")

    def _answers(self) -> bool:
        """Whether *this* server answers: another program may have taken the port since it was looked at."""
        try:
            with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5) as answer:
                return str(self.base) in json.load(answer)["system"]["argv"]
        except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError, KeyError):
            return False


def free_port() -> int:
    """A port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def refuse_used_port(port: int) -> None:
    with socket.socket() as probe:
        if os.name != "nt":  # there the option means something else: it would let us share a used port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise PortInUse(
                f"port {port} on {HOST} cannot be used ({error.strerror}): another program listens there, perhaps "
                "a ComfyUI. Stop it, or choose another port with PORT=..."
            ) from error


def _offer_pack(pack: Path, custom_nodes: Path) -> tuple[str, Path | None]:
    """The name ComfyUI will know the pack by, and a folder to search for it if it could not be linked.

    ComfyUI matches its white list against the names of the entries of each custom_nodes folder.
    """
    try:
        (custom_nodes / PACK_NAME).symlink_to(pack, target_is_directory=True)
    except OSError:  # Windows allows links to few users
        return pack.name, pack.parent
    return PACK_NAME, None


def _model_folders(models: Path) -> dict[str, str]:
    """ComfyUI's kinds of models, which are named as the folders they lie in."""
    return {folder.name: str(folder) for folder in sorted(models.iterdir()) if folder.is_dir()}


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends the server, politely first, with whatever it has started itself."""
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    finally:
        if process.stdin is not None:
            process.stdin.close()  # ends it too if we are interrupted here
        if os.name == "nt":
            process.kill()
        else:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
