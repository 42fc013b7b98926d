"""Learn shapes and appearances without ComfyUI: folders of pictures in, files for Load Inversion out.

    python -m inversion_core.learning --model MODEL --kind shape --class-word chair pictures/my-chair
    accelerate launch -m inversion_core.learning --model MODEL --concepts list.json

Each folder holds one to five pictures of one concept, and for chair.jpg a mask chair.mask.png, white where the object
is. Without masks they are proposed, and written beside the result to be looked at. Of several processes (accelerate
launch or torchrun, on one machine or many with a shared output folder) each learns its share of the concepts on a
device of its own. A run that was stopped goes on from its last step; what was learned from the same inputs is skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from ..hosts.base import HostError
from ..hosts.diffusers_learning import DiffusersLearningModel, family_of, fingerprint, learning_model
from ..hosts.diffusers_loading import load_pipeline
from ..learning.cost import foreseen
from ..learning.files import load_inversion, save_inversion
from ..learning.inversion import Inversion, Kind
from ..learning.learn import job_of, learn
from ..learning.material import digest_of, prepare, require_pictures
from ..learning.model import LearningError
from ..learning.plan import Framing, Plan
from ..learning.proposal import propose_masks
from ..learning.recipes import APPEARANCE_OBJECTIVES, NEED_FEATURES, SITES, Quality, plan_of, stages
from ..learning.token import name_of
from ..learning.trainer import Progress
from .concepts import Concept, concepts_of, read, write_mask

SIZES = {"SD1.x": 512, "SD2.x": 768, "SDXL": 1024}
LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""What accelerate and torchrun put into the environment, and what stands for it without them."""
PRECISIONS = ("float32", "bfloat16", "float16")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Process:
    """Which of how many processes this is, as accelerate and torchrun tell it."""

    rank: int
    count: int
    local: int

    @classmethod
    def from_environment(cls) -> Process:
        """One alone without a launcher."""
        rank, count, local = (int(os.environ.get(name, default)) for name, default in LAUNCHED.items())
        if not 0 <= rank < count:
            raise LearningError(f"RANK is {rank} of WORLD_SIZE {count}: start with accelerate launch or torchrun")
        return cls(rank, count, local)

    def share(self, concepts: Sequence[Concept]) -> Sequence[Concept]:
        """The concepts of this process."""
        return concepts[self.rank :: self.count]

    def device(self) -> torch.device:
        """A GPU of its own if there is one."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 if everything was learned, 1 if something failed, 130 if it was stopped."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        process = Process.from_environment()
        concepts = _concepts(options)
        mine = process.share(concepts)
        _log.info("process %d of %d learns %d of %d concepts", process.rank, process.count, len(mine), len(concepts))
        failed = _learn_all(mine, options, process) if mine else []
    except (LearningError, HostError) as error:
        _log.error("%s", error)
        return 1
    except KeyboardInterrupt:
        _log.error("stopped; the same command goes on from the last step")
        return 130
    return int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m inversion_core.learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("pictures", nargs="*", type=Path, help="folders, one for each concept")
    add("--model", required=True, help="SD1.x, SD2.x or SDXL: a diffusers folder, a checkpoint file, or a hub's name")
    add("--config", default="", help="for a checkpoint file: a diffusers folder of the same family, without weights")
    add("--download", action="store_true", help="ask the hub for the model or configuration that is named")
    add("--kind", choices=get_args(Kind), help="what the folders are learned as")
    add("--token", default="", help="stands for it in prompts, between < and >; by default the folder's name")
    add("--class-word", default="", help="what it is in plain words (default: shape or texture)")
    add("--shape", type=Path, help="for an appearance: an inversion of the pictures' shape, which stays frozen")
    add(
        "--concepts", type=Path, help="instead of folders: JSON, an array of {pictures, kind, token, class_word, shape}"
    )
    add("--output", type=Path, default=Path("inversions"), help="folder of the results (default: inversions)")
    add("--overwrite", action="store_true", help="replace results that were learned from something else")
    add("--steps", type=int, default=200, help="of the optimiser (default: 200)")
    add("--quality", choices=get_args(Quality), default="balanced", help="what is spent on a step (default: balanced)")
    objectives = [name for name in APPEARANCE_OBJECTIVES if name not in NEED_FEATURES]
    add("--objective", choices=objectives, default="attention", help="for an appearance (default: attention)")
    add("--framing", choices=get_args(Framing), default="centred", help="where a shape is learned (default: centred)")
    add("--sites", choices=SITES, default="default", help="which layers the offset changes")
    add("--rank", type=int, default=0, help="of the offset (default: as --quality says)")
    add("--learning-rate", type=float, default=0.0, help="of the offset at its highest (default: the kind's own)")
    add("--whole", action="store_true", help="learn from whole pictures: propose no masks")
    add("--size", type=int, help="largest side of a training picture (default: the family's, 512 to 1024)")
    add("--seed", type=int, default=0, help="of everything random (default: 0)")
    add("--micro-batch", type=int, default=4, help="rows at once, fewer when memory runs out (default: 4)")
    add("--precision", choices=PRECISIONS, help="of the model (default: bfloat16 on a GPU, else float32)")
    return parser


def _concepts(options: argparse.Namespace) -> list[Concept]:
    if bool(options.concepts) == bool(options.pictures):
        raise LearningError("name folders of pictures, or a list of them with --concepts: one of both")
    if options.concepts:
        found = concepts_of(options.concepts)
    elif options.kind is None:
        raise LearningError(f"say what the folders hold: --kind {' or '.join(get_args(Kind))}")
    elif options.token and len(options.pictures) > 1:
        raise LearningError("several folders cannot have one --token: leave it out, or use --concepts")
    else:
        told: dict[str, Any] = {name: getattr(options, name) for name in ("kind", "token", "class_word", "shape")}
        found = [Concept(folder, **told) for folder in options.pictures]
    for one in found:
        # Says what is wrong before the model is loaded.
        stages(one.kind, options.steps, 1, options.objective, options.learning_rate)
    names = [one.written.strip("<> ") for one in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise LearningError(f"two concepts are called {', '.join(twice)}: give each a token of its own")
    return found


def _learn_all(concepts: Sequence[Concept], options: argparse.Namespace, process: Process) -> list[Concept]:
    """Learn one after another; the concepts that failed."""
    device = process.device()
    precision = options.precision or ("bfloat16" if device.type == "cuda" else "float32")
    pipe = load_pipeline(options.model, getattr(torch, precision), config=options.config, download=options.download).to(
        device
    )
    model, failed = fingerprint(pipe), []
    for concept in concepts:
        try:
            _learn_one(concept, options, pipe, model)
        except (LearningError, HostError) as error:
            _log.error("%s: %s", concept.written, error)
            failed.append(concept)
    return failed


def _learn_one(concept: Concept, options: argparse.Namespace, pipe: Any, model_key: str) -> None:
    size = options.size or SIZES[family_of(pipe)]
    pictures, masks = read(concept.pictures, size)
    shapes = [] if concept.shape is None else [load_inversion(concept.shape)]
    with learning_model(pipe, shapes) as model:
        plan = _plan(concept, options, model, shapes)
        if masks is None:
            masks = torch.ones(pictures.shape[:3])
            if not options.whole:
                height, width = masks.shape[1:]
                masks = propose_masks(model, model.encode_pictures(pictures), concept.words, (height, width)).cpu()
                options.output.mkdir(parents=True, exist_ok=True)
                write_mask(masks, options.output / f"{plan.name}.mask.png")
        require_pictures(pictures, masks)
        frozen = "" if concept.shape is None else hashlib.sha256(concept.shape.read_bytes()).hexdigest()
        job = job_of(model_key + frozen, digest_of(pictures, masks), plan)
        path = options.output / f"{plan.name}.safetensors"
        if path.is_file():
            if load_inversion(path).settings.get("job") == job:
                _log.info("%s: learned before from the same inputs", plan.name)
                return
            if not options.overwrite:
                raise LearningError(f"{path} was learned from something else: add --overwrite, or take another token")
        material = prepare(model.encode_pictures, pictures, masks, plan)
        _log.info("%s: %s", plan.name, foreseen(model, material, plan).text())
        checkpoint = options.output / "unfinished" / f"{job}.safetensors"
        _, history = learn(
            model,
            material,
            plan,
            micro_batch=options.micro_batch,
            checkpoint=checkpoint,
            job=job,
            progress=lambda news, _: _say(plan.name, news),
            keep=lambda found: save_inversion(replace(found, settings={**found.settings, "job": job}), path),
        )
        losses = [f"{history.evaluations[place][1]:.4g}" for place in (0, -1)]
        _log.info("%s: loss on fixed noise %s to %s; written to %s", plan.name, *losses, path)


def _plan(
    concept: Concept, options: argparse.Namespace, model: DiffusersLearningModel, shapes: Sequence[Inversion]
) -> Plan:
    return plan_of(
        concept.kind,
        name_of(concept.written, model.knows_word),
        concept.words,
        options.steps,
        options.quality,
        objective=options.objective,
        seed=options.seed,
        beside=" ".join(f"<{one.name}>" for one in shapes),
        sites=options.sites,
        rank=options.rank,
        learning_rate=options.learning_rate,
        framing=options.framing,
    )


def _say(name: str, news: Progress) -> None:
    if news.evaluation is not None:
        left = divmod(round(news.seconds_left), 60)
        _log.info("%s: %d of %d steps, loss %.4g, %d:%02d left", name, news.done, news.total, news.evaluation, *left)
