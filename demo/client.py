"""Talks to a ComfyUI server: uploads, queues, follows and fetches, one call each.

The calls are synchronous; underneath, aiohttp (which ComfyUI needs as well) runs on an event loop of this object's own.
"""

import asyncio
import json
import uuid
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from io import BytesIO
from types import TracebackType
from typing import Any, TypeVar

import aiohttp
from PIL import Image

T = TypeVar("T")
Prompt = Mapping[str, Mapping[str, Any]]
"""A workflow in API form: node id -> class_type, inputs, _meta."""

_POLL_SECONDS = 1.0


class PromptRefused(Exception):
    """The server found the workflow invalid and ran nothing. `node_errors` is what it said, by node id."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        self.node_errors: dict[str, Any] = dict(answer.get("node_errors") or {})
        super().__init__("ComfyUI refused the workflow: " + "; ".join(_refusals(answer)))


class ExecutionFailed(Exception):
    """A node raised an exception while the workflow ran."""

    def __init__(self, event: Mapping[str, Any]) -> None:
        self.node_id: str = str(event.get("node_id"))
        self.node_type: str = str(event.get("node_type"))
        self.exception_type: str = str(event.get("exception_type"))
        self.message: str = str(event.get("exception_message", "")).strip()
        self.traceback: str = "".join(event.get("traceback", ()))
        super().__init__(f"node {self.node_id} ({self.node_type}) failed: {self.exception_type}: {self.message}")


class ExecutionInterrupted(Exception):
    """The run was interrupted before its end."""


class ServerGone(Exception):
    """The connection to the server broke."""


@dataclass(frozen=True)
class Progress:
    """A node has done `value` of `maximum` steps."""

    node_id: str
    value: float
    maximum: float


@dataclass(frozen=True)
class OutputFile:
    """A file in one of the server's folders, as node outputs name it."""

    filename: str
    subfolder: str
    type: str


Outputs = dict[str, dict[str, Any]]
"""Node id -> what the node showed, e.g. {"images": [{"filename", "subfolder", "type"}]}."""


class ComfyClient:
    """Context manager around one session with the server at `url`."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._id = uuid.uuid4().hex
        self._loop = asyncio.new_event_loop()
        self._session: aiohttp.ClientSession | None = None
        self._socket: aiohttp.ClientWebSocketResponse[bool] | None = None

    def __enter__(self) -> "ComfyClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if not self._loop.is_closed():
            self._loop.run_until_complete(self._close())
            self._loop.close()

    def upload_image(self, image: Image.Image, name: str) -> str:
        """Puts a picture into the server's input folder; returns the name a LoadImage node knows it by."""
        buffer = BytesIO()
        image.save(buffer, "PNG")
        form = aiohttp.FormData()
        form.add_field("image", buffer.getvalue(), filename=name, content_type="image/png")
        form.add_field("overwrite", "true")
        answer = self._call(self._json("POST", "/upload/image", data=form))
        return f"{answer['subfolder']}/{answer['name']}" if answer["subfolder"] else answer["name"]

    def queue(self, prompt: Prompt) -> str:
        """Queues a workflow and returns its id; raises PromptRefused if the server finds it invalid."""
        return self._call(self._queue(prompt))

    def wait(self, prompt_id: str, on_progress: Callable[[Progress], None] | None = None) -> Outputs:
        """Follows a queued workflow to its end; raises ExecutionFailed or ExecutionInterrupted."""
        return self._call(self._wait(prompt_id, on_progress))

    def run(self, prompt: Prompt, on_progress: Callable[[Progress], None] | None = None) -> Outputs:
        return self.wait(self.queue(prompt), on_progress)

    def fetch(self, file: OutputFile) -> bytes:
        parameters = {"filename": file.filename, "subfolder": file.subfolder, "type": file.type}
        return self._call(self._bytes("GET", "/view", params=parameters))

    def fetch_images(self, outputs: Outputs, node_id: str) -> list[Image.Image]:
        """The pictures a node has saved or previewed."""
        files = [OutputFile(**entry) for entry in outputs.get(node_id, {}).get("images", ())]
        return [Image.open(BytesIO(self.fetch(file))) for file in files]

    def object_info(self, node_class: str) -> dict[str, Any] | None:
        """What the server says of a node class; None if it does not know it."""
        return self._call(self._json("GET", f"/object_info/{node_class}")).get(node_class)

    def interrupt(self) -> None:
        """Stops what runs now, at the node's next step."""
        self._call(self._bytes("POST", "/interrupt"))

    def free(self) -> None:
        """Unloads all models and drops cached node outputs, once the queue is empty."""
        self._call(self._bytes("POST", "/free", json={"unload_models": True, "free_memory": True}))

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self._loop.run_until_complete(work)
        except (aiohttp.ClientConnectionError, ConnectionError) as error:
            raise ServerGone(f"no connection to ComfyUI at {self._url}: {error}") from error

    async def _close(self) -> None:
        if self._socket is not None:
            await self._socket.close()
        if self._session is not None:
            await self._session.close()

    async def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            # No limit on the whole: a node may run for minutes between two messages.
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None, sock_connect=10))
        return self._session

    async def _bytes(self, method: str, path: str, **arguments: Any) -> bytes:
        session = await self._open_session()
        async with session.request(method, self._url + path, **arguments) as answer:
            answer.raise_for_status()
            return await answer.read()

    async def _json(self, method: str, path: str, **arguments: Any) -> Any:
        return json.loads(await self._bytes(method, path, **arguments))

    async def _queue(self, prompt: Prompt) -> str:
        session = await self._open_session()
        if self._socket is None or self._socket.closed:
            # Before the workflow is posted, lest its first messages find no listener.
            self._socket = await session.ws_connect(f"{self._url}/ws", params={"clientId": self._id}, max_msg_size=0)
        body = {"prompt": prompt, "client_id": self._id}
        async with session.post(f"{self._url}/prompt", json=body) as answer:
            if answer.status == 400:
                raise PromptRefused(await answer.json())
            answer.raise_for_status()
            return (await answer.json())["prompt_id"]

    async def _wait(self, prompt_id: str, on_progress: Callable[[Progress], None] | None) -> Outputs:
        over = False
        while (record := await self._record(prompt_id)) is None:
            over = await self._listen(prompt_id, on_progress)
        if not over and on_progress is not None and self._socket is not None:
            # The run ended between a look at the messages and a look at the record: its last messages are yet to come.
            await self._listen(prompt_id, on_progress)
        for event, content in record["status"]["messages"]:
            if event == "execution_error":
                raise ExecutionFailed(content)
            if event == "execution_interrupted":
                raise ExecutionInterrupted(f"the run was interrupted in node {content['node_id']}")
        return record["outputs"]

    async def _record(self, prompt_id: str) -> dict[str, Any] | None:
        """What the server has written down of a finished run; None while it is queued or running."""
        return (await self._json("GET", f"/history/{prompt_id}")).get(prompt_id)

    async def _listen(self, prompt_id: str, on_progress: Callable[[Progress], None] | None) -> bool:
        """Reads messages until the run seems to be over, or for a second without any (another call may read them).

        Returns whether the message that says so came.
        """
        if self._socket is None:
            raise RuntimeError("queue the workflow with this client before waiting for it")
        while True:
            try:
                message = await self._socket.receive(_POLL_SECONDS)
            except asyncio.TimeoutError:
                return False
            if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR):
                raise ServerGone(f"ComfyUI at {self._url} closed the connection during the run")
            if message.type != aiohttp.WSMsgType.TEXT:
                continue  # a preview picture
            event = json.loads(message.data)
            content = event["data"]
            if content.get("prompt_id") != prompt_id:
                continue
            if event["type"] == "executing" and content["node"] is None:
                return True
            if event["type"] == "progress" and on_progress is not None:
                on_progress(Progress(str(content["node"]), content["value"], content["max"]))


def _refusals(answer: Mapping[str, Any]) -> list[str]:
    """Each thing the server objects to, in one line that names the node."""
    lines = [
        f"node {node_id} ({report['class_type']}): {error['message']}: {error['details']}"
        for node_id, report in (answer.get("node_errors") or {}).items()
        for error in report["errors"]
    ]
    if lines:
        return lines
    error = answer.get("error")
    return [f"{error['message']}: {error['details']}" if isinstance(error, Mapping) else str(error)]
