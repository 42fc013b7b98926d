"""The demo: two pictures in, their composition out, through a real ComfyUI server.

    python -m demo.compose [--shape a.png] [--appearance b.png] [--checkpoint name.safetensors] ...

Without pictures it takes a pair of the demo world, whose true composition is known, and scores the result by it.
"""

import argparse
import json
import signal
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from . import world
from .client import ComfyClient, ExecutionFailed, ExecutionInterrupted, Progress, PromptRefused, ServerGone
from .comfy import PACK, ComfyUI, ComfyUINotFound, find_comfyui
from .graph import Graph, GraphError, load_graph, node_titled, with_checkpoint, with_inputs, with_picture, without_mask
from .scoring import score_composition
from .server import ComfyServer, PortInUse, ServerFailed
from .sheet import contact_sheet

WORKFLOW = PACK / "workflows" / "api" / "shape_and_appearance.json"
OUTPUT = Path("demo_output")
RESULTS = ("shape.png", "appearance.png", "truth.png", "result.png", "sheet.png", "scores.json")
PORT = 8199  # not ComfyUI's own 8188, where the user's may be running

_LATENT_CELL = 8
_SD15_SIZE = 512
_SDXL_SIZE = 1024
_SDXL_KEY = "conditioner.embedders.1."  # its second text encoder
_EXPECTED = (
    ComfyUINotFound,
    ExecutionFailed,
    ExecutionInterrupted,
    GraphError,
    PortInUse,
    PromptRefused,
    ServerFailed,
    ServerGone,
)


class BadOption(Exception):
    """An option that cannot be followed."""


@dataclass(frozen=True)
class Options:
    shape: Path | None
    appearance: Path | None
    prompt: str | None
    checkpoint: str | None
    size: int | None
    port: int
    workflow: Path
    output: Path


@dataclass(frozen=True)
class Job:
    """The pictures as they are uploaded (an alpha channel is a mask, 0 for the object) and the text to go with them.

    `truth` and `score` exist where the true answer is known: where both pictures are the demo world's.
    """

    shape: Image.Image
    appearance: Image.Image
    prompt: str
    truth: Image.Image | None = None
    score: Callable[[Image.Image], dict[str, float]] | None = None


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, _leave)  # so that `with` stops the server, as after Ctrl-C
    try:
        compose(options)
    except KeyboardInterrupt:
        print("interrupted; the server is stopped", file=sys.stderr)
        return 130
    except (BadOption, *_EXPECTED) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: list[str] | None) -> Options:
    parser = argparse.ArgumentParser("python -m demo.compose", description="Compose two pictures in a real ComfyUI.")
    parser.add_argument("--shape", type=Path, help="picture whose shape is kept (default: one of the demo world)")
    parser.add_argument("--appearance", type=Path, help="picture whose appearance is taken (default: likewise)")
    parser.add_argument("--prompt", help="text prompt (default: what the demo pair shows, or none)")
    parser.add_argument("--checkpoint", help="an SD1.5 or SDXL model of your ComfyUI (needs COMFYUI_PATH)")
    parser.add_argument("--size", type=int, help="side of the result in pixels (default: what the model is made for)")
    parser.add_argument("--port", type=int, default=PORT, help=f"the server's port (default: {PORT})")
    parser.add_argument("--workflow", type=Path, default=WORKFLOW, help="workflow in API form")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"folder for the results (default: {OUTPUT})")
    return Options(**vars(parser.parse_args(arguments)))


def compose(options: Options) -> None:
    comfyui = find_comfyui()
    job = plan(options)
    graph = edit(load_graph(options.workflow), options, job, comfyui)
    make_way(options.output)
    log = options.output / "comfyui.log"

    print(f"starting ComfyUI from {comfyui.path} (log: {log})", flush=True)
    with ComfyServer(options.port, log=log, comfyui=comfyui) as server, ComfyClient(server.url) as client:
        result = run(client, graph, job)
    print("the server is stopped")
    save(options.output, job, result)


def plan(options: Options) -> Job:
    """What is to be composed. One picture of the user's and one of the demo world's go together, but unscored."""
    shape_of, appearance_of = world.demo_pair()
    if options.shape or options.appearance:
        return Job(
            shape=read_picture(options.shape) if options.shape else _masked(world.render(shape_of)),
            appearance=read_picture(options.appearance) if options.appearance else _masked(world.render(appearance_of)),
            prompt=options.prompt or "",
        )
    target = world.compose(shape_of, appearance_of, shape_of)
    return Job(
        shape=_masked(world.render(shape_of)),
        appearance=_masked(world.render(appearance_of)),
        # The prompt names the place and nothing else: shape and appearance must come from the pictures.
        prompt=f"a shape on {target.background}" if options.prompt is None else options.prompt,
        truth=_picture(world.render(target).image),
        score=lambda result: score_composition(_floats(result), shape_of, appearance_of, shape_of),
    )


def edit(graph: Graph, options: Options, job: Job, comfyui: ComfyUI) -> Graph:
    """The workflow as it will be posted, but for the names the server gives the uploaded pictures."""
    graph = with_inputs(graph, "Prompt", text=job.prompt)
    for title, picture in (("Shape image", job.shape), ("Appearance image", job.appearance)):
        if picture.mode != "RGBA":
            graph = without_mask(graph, title)
    size = options.size
    if options.checkpoint:
        if not comfyui.is_users:
            raise BadOption(
                f"CHECKPOINT={options.checkpoint} needs COMFYUI_PATH=the folder of your ComfyUI, whose models/ holds it"
            )
        graph = with_checkpoint(graph, options.checkpoint)
        size = size or checkpoint_size(comfyui.path / "models" / "checkpoints" / options.checkpoint)
    if size is None:
        return graph
    if size <= 0 or size % _LATENT_CELL:
        raise BadOption(f"SIZE={size}: the side of the result must be a positive multiple of {_LATENT_CELL} pixels")
    return with_inputs(graph, "Size", width=size, height=size)


def checkpoint_size(path: Path) -> int:
    """The side a checkpoint is made for: 1024 if it is SDXL's, by its list of tensors, else 512."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            names = json.loads(file.read(length))
    except (OSError, ValueError, struct.error, MemoryError, OverflowError):
        print(f"cannot read {path}: taking it for an SD1.5 model, {_SD15_SIZE} pixels (SIZE=... says otherwise)")
        return _SD15_SIZE
    return _SDXL_SIZE if any(name.startswith(_SDXL_KEY) for name in names) else _SD15_SIZE


def run(client: ComfyClient, graph: Graph, job: Job) -> Image.Image:
    for title, name, picture in (
        ("Shape image", "shape.png", job.shape),
        ("Appearance image", "appearance.png", job.appearance),
    ):
        graph = with_picture(graph, title, client.upload_image(picture, name))
    with ProgressBar(graph) as bar:
        outputs = client.run(graph, bar.show)
    (result,) = client.fetch_images(outputs, node_titled(graph, "Result"))
    return result


class ProgressBar:
    """A bar for each node that reports steps, under the node's title."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._node: str | None = None
        self._bar: tqdm | None = None

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, progress: Progress) -> None:
        if self._bar is None or progress.node_id != self._node:
            self.__exit__()
            title = self._graph.get(progress.node_id, {}).get("_meta", {}).get("title", progress.node_id)
            self._node, self._bar = progress.node_id, tqdm(total=progress.maximum, desc=title, unit="step")
        self._bar.update(progress.value - self._bar.n)


def save(output: Path, job: Job, result: Image.Image) -> None:
    pictures = {"shape": job.shape.convert("RGB"), "appearance": job.appearance.convert("RGB")}
    if job.truth is not None:
        pictures["truth"] = job.truth
    pictures["result"] = result
    for name, picture in pictures.items():
        picture.save(output / f"{name}.png")
    labels = {"truth": "true answer"}
    contact_sheet({labels.get(name, name): picture for name, picture in pictures.items()}).save(output / "sheet.png")
    print(f"wrote {output / 'sheet.png'}")
    if job.score is None:
        print("no scores: the true answer is known for the demo world's own pair only")
        return
    scores = job.score(result)
    (output / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    for name, value in scores.items():
        print(f"{name}: {value:.3f}")


def read_picture(path: Path) -> Image.Image:
    """A picture upright, as RGBA if its alpha channel marks an object, else as RGB."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGBA")
    except OSError as error:
        raise BadOption(f"cannot read the picture {path}: {error}") from error
    is_opaque = np.asarray(picture.getchannel("A")).min() == 255
    return picture.convert("RGB") if is_opaque else picture


def _masked(rendered: world.Rendered) -> Image.Image:
    picture = _picture(rendered.image)
    picture.putalpha(Image.fromarray(np.uint8(np.round((1 - rendered.mask) * 255))))
    return picture


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.uint8(np.round(image * 255)))


def _floats(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255


def make_way(output: Path) -> None:
    """Removes what an earlier run left, so that nothing of it is taken for this one's after a failure."""
    output.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:
        (output / name).unlink(missing_ok=True)


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
