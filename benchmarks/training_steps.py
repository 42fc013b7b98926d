"""A step of learning beside the bare pass it cannot do without, and beside diffusers' textual inversion.

All on the same weights, rows, noise levels and text encoder: SD1.5's sizes, random values.

- *bare*: the prompts through ComfyUI's text encoder with the vectors to learn in them, the noisy latents through its
  UNet, the squared error, and its gradient at the vectors: no offset, no mask, no optimiser.
- *ours*: a whole step of `learning.trainer` by the nodes' recipe.
- *diffusers*: the loop of its example script (examples/textual_inversion), written down here: gradient and AdamW on the
  whole embedding table, of which all rows but one are put back after each step. Latents are given, so that it need not
  encode the picture anew each time, as the script does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

from demo.train.data import reset
from inversion_core.hosts.comfy_learning import ComfyLearningModel, learning_model
from inversion_core.learning.inversion import Kind
from inversion_core.learning.lesson import InversionLesson
from inversion_core.learning.material import Material
from inversion_core.learning.objectives import noised
from inversion_core.learning.plan import Plan
from inversion_core.learning.recipes import SPENDING, stages
from inversion_core.learning.trainer import Progress, train

from .memory import peak_bytes
from .steps import clock, seconds
from .unets import Patcher, build, synchronise

Figures = dict[str, Any]
Work = Callable[[], None]

KINDS: tuple[Kind, ...] = ("shape", "appearance")
PLACE = 2
"""Of the learned word among the prompt's tokens."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What all three work on.

    Attributes:
        patcher, clip: ComfyUI's model and text encoder.
        unet, text: diffusers' and transformers', on the same tensors (the embedding table is a copy: it is learned).
        clean, noise: (rows, 4, h, w).
        level: (rows,) of noise, in [0, 1).
    """

    patcher: Patcher
    clip: Any
    unet: Any
    text: Any
    clean: Tensor
    noise: Tensor
    level: Tensor

    @classmethod
    def of(cls, dtype: torch.dtype, latent: int, rows: int, tiny: bool) -> Setting:
        """Random weights; `tiny`: block for block the same, a tenth of their width."""
        unet = build("sd15", latent, dtype, tiny=tiny)
        device = unet.patcher.load_device
        clip, text = _text_encoders(unet.positive[0][0].shape[2])
        torch.manual_seed(1)
        clean, noise = (torch.randn(rows, 4, latent, latent).to(device) for _ in range(2))
        level = torch.linspace(0.3, 0.7, rows, device=device)
        twin = _diffusers(unet.patcher).to(device)
        return cls(unet.patcher, clip, twin, text.to(device), clean, noise, level)


def measure_training(
    figures: Figures, dtype: torch.dtype, *, latent: int, rows: int, pairs: int, tiny: bool, save: Work
) -> None:
    """Everything, into `figures`; `save` is called after each part."""
    figures |= {"latent": latent, "rows": rows, "pairs": pairs, "tiny": tiny, "kinds": {}}
    with torch.inference_mode(False), torch.enable_grad():
        setting = Setting.of(dtype, latent, rows, tiny)
        rival = TextualInversion(setting)
        figures["diffusers_peak_mib"] = _mib(rival.peak())
        setting.unet.train().enable_gradient_checkpointing()
        figures["diffusers_checkpointed_peak_mib"] = _mib(rival.peak())
        setting.unet.disable_gradient_checkpointing()
        rival.begin()
        save()
        for kind in tqdm(KINDS, desc="training"):
            found = figures["kinds"][kind] = {}
            with learning_model(setting.patcher, setting.clip, setting.clean.shape) as opened:
                _measure_kind(found, kind, opened, setting, rival, pairs)
            ours, theirs = found["checkpointed_peak_mib"], figures["diffusers_checkpointed_peak_mib"]
            found["both_checkpointed_peak_memory_ratio"] = ours / theirs
            for name in ("", "checkpointed_"):
                found[f"{name}peak_memory_ratio"] = found[f"{name}peak_mib"] / figures["diffusers_peak_mib"]
            save()


def _measure_kind(
    found: Figures, kind: Kind, opened: ComfyLearningModel, setting: Setting, rival: TextualInversion, pairs: int
) -> None:
    rows = len(setting.clean)
    lesson = _lesson(opened, setting, _plan(kind, pairs + 1, rows))
    times: list[tuple[float, float, float]] = []
    begun = clock()

    def between(_: Progress) -> None:
        nonlocal begun
        synchronise()
        ours = clock() - begun
        times.append((ours, seconds(lambda: bare(opened, setting)), seconds(rival.step)))
        begun = clock()

    train(lesson, lesson.plan.stages, micro_batch=rows, progress=between)
    del times[0]  # it warmed up
    found["bare_ms"] = 1000 * median(one for _, one, _ in times)
    found["training_step_ratio"] = median(ours / one for ours, one, _ in times)
    found["diffusers_step_ratio"] = median(ours / one for ours, _, one in times)
    learned = sum(one.nbytes for module in lesson.groups.values() for one in module.parameters())
    for name in ("", "checkpointed_"):
        lesson = _lesson(opened, setting, _plan(kind, 1, rows))
        if name:
            lesson.save_memory()
        found[f"{name}peak_mib"] = _mib(learned + peak_bytes(lambda lesson=lesson: _learn(lesson)))
    opened.checkpointing = None


def _lesson(opened: ComfyLearningModel, setting: Setting, plan: Plan) -> InversionLesson:
    """One whose loss on fixed noise is not looked at: a step is measured, not what comes every 15 of them."""
    lesson = InversionLesson(opened, _material(setting), plan)
    lesson.evaluate = lambda stage: 0.0
    return lesson


def _learn(lesson: InversionLesson) -> None:
    train(lesson, lesson.plan.stages, micro_batch=lesson.plan.stages[0].batch)


def bare(opened: ComfyLearningModel, setting: Setting) -> None:
    """Forwards and backwards through ComfyUI's own modules."""
    token = {name: value.requires_grad_() for name, value in opened.words("shape").items()}
    conditioning = opened.encode(["a <x> shape"] * len(setting.clean), {"x": token})
    noisy = noised(setting.clean, setting.noise, opened.schedule(setting.level)).to(setting.unet.dtype)
    unet = setting.patcher.model.diffusion_model
    made = unet(noisy, _timesteps(setting), context=conditioning.context.to(noisy.dtype))
    F.mse_loss(made.float(), setting.noise).backward()
    synchronise()


class TextualInversion:
    """The loop of diffusers' example script."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.table = setting, setting.text.get_input_embeddings()
        self.ids = torch.randint(1000, 2000, (len(setting.clean), 77), generator=torch.Generator().manual_seed(0))
        self.ids = self.ids.to(setting.clean.device)
        self.word = int(self.ids[0, PLACE])
        setting.text.requires_grad_(False)
        self.table.weight.requires_grad_(True)

    def begin(self) -> None:
        """What the script makes before its loop."""
        self.optimiser = torch.optim.AdamW(self.table.parameters(), lr=5e-4)
        self.original = self.table.weight.data.clone()
        self.kept = torch.ones(len(self.original), dtype=torch.bool, device=self.original.device)
        self.kept[self.word] = False

    def step(self) -> None:
        """One step of the optimiser."""
        setting = self.setting
        timesteps = _timesteps(setting)
        sigma = setting.patcher.model.model_sampling.sigmas.to(setting.clean.device)[timesteps].view(-1, 1, 1, 1)
        noisy = (setting.clean + sigma * setting.noise) / (1 + sigma.square()).sqrt()
        dtype = setting.unet.dtype
        states = setting.text(self.ids)[0].to(dtype)
        made = setting.unet(noisy.to(dtype), timesteps, states).sample
        F.mse_loss(made.float(), setting.noise).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        with torch.no_grad():
            self.table.weight[self.kept] = self.original[self.kept]
        synchronise()

    def peak(self) -> int:
        """Bytes beside the model's weights, with what lives from step to step."""

        def work() -> None:
            self.begin()
            self.step()

        found = peak_bytes(work)
        del self.optimiser, self.original, self.kept
        return found


def _timesteps(setting: Setting) -> Tensor:
    return (setting.level * 1000).long()


def _plan(kind: Kind, steps: int, rows: int) -> Plan:
    """The nodes' own, without steps of the token alone."""
    spent = SPENDING["balanced"]
    made = stages(kind, steps, rows)[-1]
    return Plan(kind, "x", "shape", (made,), vectors=spent.vectors, rank=spent.rank, variants=2)


def _material(setting: Setting) -> Material:
    latents = torch.cat([setting.clean, setting.noise]).cpu()
    masks = torch.zeros(len(latents), 1, *latents.shape[2:])
    quarter = latents.shape[-1] // 4
    masks[..., quarter:-quarter, quarter:-quarter] = 1
    preview = torch.zeros(8, 8, 3, dtype=torch.uint8)
    return Material(latents, masks, (("a <x> shape",),) * len(latents), latents[:1], masks[:1], preview, "")


def _diffusers(patcher: Patcher) -> Any:
    """The UNet in diffusers' clothes, on the same tensors."""
    config = patcher.model.model_config.unet_config
    width = config["model_channels"]
    channels = tuple(width * factor for factor in config["channel_mult"])
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            cross_attention_dim=config["context_dim"],
            block_out_channels=channels,
            down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
            attention_head_dim=8,
        )
    weights = patcher.model.diffusion_model.state_dict()
    table = comfy.utils.unet_to_diffusers(config)
    unet.load_state_dict({name: weights[table[name]] for name in unet.state_dict()}, assign=True)
    return unet.requires_grad_(False)


def _text_encoders(width: int) -> tuple[Any, Any]:
    """ComfyUI's CLIP-L of this width in float32, and transformers' with the same weights."""
    layers = 12 if width == 768 else 2
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    sizes["num_attention_heads"] = max(1, width // 64)
    options: dict[str, Any] = {"dtype": torch.float32, "clip_l_model_config": sizes}
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    clip = comfy.sd.CLIP(target=target, parameters=1, model_options=options)
    clip.tokenizer.clip_l.embedding_size = width
    torch.manual_seed(2)
    reset(clip.cond_stage_model)
    for module in clip.cond_stage_model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    text = CLIPTextModel(CLIPTextConfig(**sizes, projection_dim=width, hidden_act="quick_gelu"))
    weights = clip.cond_stage_model.clip_l.transformer.state_dict()
    short = {name.removeprefix("text_model."): value for name, value in weights.items()}
    text.load_state_dict({name: short[name.removeprefix("text_model.")] for name in text.state_dict()})
    return clip, text.eval()


def _mib(count: float) -> float:
    return count / 2**20
