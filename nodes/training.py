"""What Shape Inversion and Appearance Inversion share: pictures made ready, learning with progress, results reused."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import comfy.model_management
import comfy.utils
import latent_preview
import numpy as np
import torch
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ..inversion_core.features import FeatureExtractor
from ..inversion_core.fingerprint import weights_fingerprint
from ..inversion_core.hosts.comfy_guides import guides_of, needs_features
from ..inversion_core.hosts.comfy_inversion import knows_word
from ..inversion_core.hosts.comfy_learning import fingerprint, learning_model
from ..inversion_core.learning import recipes
from ..inversion_core.learning.cost import foreseen
from ..inversion_core.learning.files import load_inversion, save_inversion
from ..inversion_core.learning.inversion import Inversion, Kind
from ..inversion_core.learning.learn import job_of, learn
from ..inversion_core.learning.lesson import InversionLesson
from ..inversion_core.learning.material import digest_of, prepare, require_pictures
from ..inversion_core.learning.pictures import fitted as reduced
from ..inversion_core.learning.plan import Plan
from ..inversion_core.learning.proposal import propose_masks
from ..inversion_core.learning.token import name_of
from ..inversion_core.learning.trainer import History, Progress
from .inversion_files import finished, unfinished
from .loss_plot import loss_plot
from .picture_mask import picture_mask


class Learned(NamedTuple):
    """A node's four outputs."""

    inversion: Inversion
    plot: Tensor
    report: str
    mask: Tensor


def fitted(images: Tensor, mask: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Pictures (B, H, W, 3) at most `size` on a side, cut at the centre to even sides, and their masks (B, H, W);
    without a mask, everywhere."""
    pictures = images[..., :3].float().cpu()
    masks = torch.ones(pictures.shape[:3])
    if mask is not None:
        masks = picture_mask(mask, images, "the mask").cpu().expand(len(pictures), -1, -1)
    return reduced(pictures, masks, size)


def proposed(model: Any, clip: Any, vae: Any, pictures: Tensor, class_word: str) -> Tensor:
    """Masks (B, H, W) for pictures that came without: see `propose_masks`."""
    latents = model.model.process_latent_in(vae.encode(pictures)).clone()
    with learning_model(model, clip, latents.shape) as opened:
        return propose_masks(opened, latents, class_word, (pictures.shape[1], pictures.shape[2])).cpu()


def plan_of(kind: Kind, clip: Any, *, token: str, **settings: Any) -> Plan:
    """The plan of a node's settings: see `recipes.plan_of`."""
    return recipes.plan_of(kind, name_of(token, partial(knows_word, clip)), **settings)


def learned(
    model: Any,
    clip: Any,
    vae: Any,
    pictures: Tensor,
    masks: Tensor,
    plan: Plan,
    features: FeatureExtractor | None = None,
) -> Learned:
    """Learn what the plan says, or return at once what was learned from exactly this before."""
    # Pictures come from other nodes as inference tensors, which autograd will not have.
    pictures, masks = pictures.clone(), masks.clone()
    require_pictures(pictures, masks)
    seen = features.weights if features is not None and needs_features(plan) else ""
    models = f"{fingerprint(model, clip)} {weights_fingerprint(vae.first_stage_model.state_dict())} {seen}"
    job = job_of(models, digest_of(pictures, masks), plan)
    begun = time.monotonic()
    if finished(job).is_file():
        inversion = load_inversion(finished(job))
        note = "learned before from the same inputs; nothing had to be done"
    else:
        inversion, history = _learn(model, clip, vae, pictures, masks, plan, features, job)
        note = _account(history, time.monotonic() - begun)
    evaluations = inversion.settings["evaluations"]
    total = sum(stage.steps for stage in plan.stages)
    plot = loss_plot(evaluations, total, f"<{plan.name}>, loss on fixed noise")
    pixels = torch.from_numpy(np.asarray(plot, dtype=np.float32) / 255)[None]
    return Learned(inversion, pixels, f"{plan.kind} <{plan.name}> for {inversion.family}: {note}", masks)


def _learn(
    model: Any,
    clip: Any,
    vae: Any,
    pictures: Tensor,
    masks: Tensor,
    plan: Plan,
    features: FeatureExtractor | None,
    job: str,
) -> tuple[Inversion, History]:
    total = sum(stage.steps for stage in plan.stages)
    bar = comfy.utils.ProgressBar(plan.variants + total)

    def encode(picture: Tensor) -> Tensor:
        return model.model.process_latent_in(vae.encode(picture))

    def encoded(done: int, _: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done)

    # Before the model is opened: the autoencoder may push it out of memory.
    material = prepare(encode, pictures, masks, plan, encoded)
    look = _look(model, plan, total)

    def step(news: Progress, lesson: InversionLesson) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview = None if news.evaluation is None else ("JPEG", look(news, lesson), 512)
        bar.update_absolute(plan.variants + news.done, preview=preview)

    batch = max(stage.batch for stage in plan.stages)
    with (
        learning_model(model, clip, [batch, *material.latents.shape[1:]]) as opened,
        guides_of(features, plan, opened, vae, pictures, masks) as guides,
    ):
        cost = foreseen(opened, material, plan, guides)
        _say(cost.text())
        rows = cost.rows(int(comfy.model_management.get_free_memory(opened.device)))
        return learn(
            opened,
            material,
            plan,
            guides=guides,
            micro_batch=rows,
            checkpoint=unfinished(job),
            job=job,
            progress=step,
            keep=partial(save_inversion, path=finished(job)),
        )


def _say(text: str) -> None:
    """On the node and in the log."""
    logging.info("Shape & Appearance: %s", text)
    context = get_executing_context()
    if context is not None:
        # No node has a context but on a server, and only there this import works.
        from server import PromptServer  # pyright: ignore[reportMissingImports]

        PromptServer.instance.send_progress_text(text, context.node_id)


def _look(model: Any, plan: Plan, total: int) -> Callable[[Progress, InversionLesson], Image.Image]:
    """What progress shows: the curve with loss and time left, which are also said, and a rough picture of what the
    token means by now."""
    seen: list[tuple[int, float]] = []
    previewer = latent_preview.Latent2RGBPreviewer(
        model.model.latent_format.latent_rgb_factors, model.model.latent_format.latent_rgb_factors_bias
    )

    def look(news: Progress, lesson: InversionLesson) -> Image.Image:
        assert news.evaluation is not None
        seen.append((news.done, news.evaluation))
        minutes, seconds = divmod(round(news.seconds_left), 60)
        caption = f"<{plan.name}> {news.stage}: loss {news.loss:.4g}, {minutes}:{seconds:02d} left"
        _say(f"{caption}, {news.done} of {total} steps")
        plot = loss_plot(seen, total, caption)
        sample = previewer.decode_latent_to_preview(lesson.sample())
        sheet = Image.new("RGB", (plot.width + plot.height, plot.height))
        sheet.paste(plot)
        sheet.paste(sample.resize((plot.height, plot.height)), (plot.width, 0))
        return sheet

    return look


def _account(history: History, seconds: float) -> str:
    steps = len(next(iter(history.losses.values())))
    last = ", ".join(f"{name} {np.mean(values[-10:]):.4g}" for name, values in history.losses.items())
    fell = f"{history.evaluations[0][1]:.4g} to {history.evaluations[-1][1]:.4g}"
    flat = f"; {', '.join(history.stopped_early)} ended early as the loss was flat" if history.stopped_early else ""
    return (
        f"{steps} steps in {seconds:.0f} s, {history.micro_batch} rows at once; loss on fixed noise {fell}; "
        f"last losses {last}{flat}"
    )
