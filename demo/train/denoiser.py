"""Stage 2: the UNet and its text encoder together, on cached latents of the training vocabulary."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import world
from ..denoiser import build_denoiser
from ..generate import generate
from ..model import DemoModel, load_vae
from ..text import clip_target
from ..weights import DENOISER, TEXT_ENCODER, load_weights, save_weights
from .data import TRAINING_SEED, pictures, reset, write_grid
from .loop import Recipe

BATCH = 32
PICTURES = 24_000
DROP_ALL, DROP_WORD = 0.1, 0.06
LEARNED_LAST = {"striped": 3.0}
"""How much oftener than the others these textures are drawn: straight stripes take the longest."""
OBJECT_WEIGHT = 3.0
"""How much more an error inside the object counts. Textures are learned last, and only the object has one."""


class DenoiserStage:
    """v-prediction, uniform timesteps. Words are dropped at random, so that captions may leave things open."""

    def __init__(self, device: torch.device, steps: int = 9000) -> None:
        self.recipe = Recipe("denoiser", steps=steps, learning_rate=1.2e-3, ema=0.999)
        self.device = device
        torch.manual_seed(1)
        self.base = build_denoiser()
        self.clip = comfy.sd.CLIP(target=clip_target(), parameters=1, model_options={"dtype": torch.float32})
        text = self.clip.cond_stage_model
        self.model = nn.ModuleDict({"unet": self.base.diffusion_model, "text": text})
        reset(self.model)
        embeddings = text.clip_l.transformer.text_model.embeddings
        for table in (embeddings.token_embedding, embeddings.position_embedding):
            nn.init.normal_(table.weight, std=0.05)
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        text.clip_l.logit_scale.requires_grad_(False)
        _protect_from_inplace(text)
        self.model.train().to(device)
        self.vae = load_vae()
        self.latents = self._cache(Path("runs") / "latents.safetensors").to(device)
        shares = np.array([_share(TRAINING_SEED + index) for index in range(PICTURES)])
        self.shares = shares / shares.sum()
        self.weights = _weights(Path("runs") / "objects.safetensors").to(device)

    def warm_start(self) -> None:
        """Begin with the committed weights instead of random ones."""
        self.base.diffusion_model.load_state_dict(load_weights(DENOISER))
        self.clip.cond_stage_model.load_state_dict(load_weights(TEXT_ENCODER))

    def _cache(self, file: Path) -> Tensor:
        from safetensors.torch import load_file, save_file

        if not file.is_file():
            parts = []
            for first in tqdm(range(0, PICTURES, 64), desc="latents", mininterval=10):
                seeds = range(TRAINING_SEED + first, TRAINING_SEED + min(first + 64, PICTURES))
                real = ((pictures(seeds)[0] + 1) / 2).permute(0, 2, 3, 1)
                with torch.no_grad():
                    parts.append(self.vae.encode(real).half())
            save_file({"latents": torch.cat(parts)}, file)
        return load_file(file)["latents"]

    def loss(self, step: int) -> Tensor:
        rng = np.random.default_rng([2, step])
        chosen = rng.choice(PICTURES, BATCH, p=self.shares)
        seeded = torch.Generator().manual_seed(step)
        clean = self.latents[torch.from_numpy(chosen)].float()
        noise = torch.randn(clean.shape, generator=seeded).to(clean)
        timestep = torch.from_numpy((np.arange(BATCH) + rng.random()) / BATCH * 1000).long().to(self.device)
        captions = [caption(world.sample(TRAINING_SEED + int(i)), rng) for i in chosen]
        sigma = self.base.model_sampling.sigmas.to(self.device)[timestep].view(-1, 1, 1, 1)
        alpha = (1 + sigma**2).rsqrt()
        noisy = alpha * clean + alpha * sigma * noise
        target = alpha * noise - alpha * sigma * clean
        with torch.autocast(self.device.type, torch.bfloat16):
            context = self._encode(captions)
            made = self.model["unet"](noisy, timestep.float(), context=context)
        weight = self.weights[torch.from_numpy(chosen)].float()
        return ((made.float() - target).square() * weight).mean() / weight.mean()

    def _encode(self, captions: list[str]) -> Tensor:
        tokens = [self.clip.tokenize(text)["l"][0] for text in captions]
        ids = torch.tensor([[token for token, _ in row] for row in tokens], device=self.device)
        return self.clip.cond_stage_model.clip_l.transformer(ids)[0].float()

    def samples(self, folder: Path, step: int) -> str:
        factors = [world.sample(seed) for seed in range(24)]
        demo = DemoModel(_patcher(self.base), self.clip, self.vae)
        made = generate(demo, [world.prompt(f) for f in factors], range(24), steps=16)
        write_grid(made.permute(0, 3, 1, 2) * 2 - 1, folder / f"{step:06d}.png", 12)
        return ""

    def export(self) -> None:
        save_weights(DENOISER, self.model["unet"].state_dict())
        save_weights(TEXT_ENCODER, self.model["text"].state_dict())


def _share(seed: int) -> float:
    """How often a picture is drawn, relative to the others."""
    return LEARNED_LAST.get(world.sample(seed).appearance.texture, 1.0)


def _weights(file: Path) -> Tensor:
    """How much each place of each picture counts: (PICTURES, 1, 16, 16), from 1 to 1 + OBJECT_WEIGHT."""
    from safetensors.torch import load_file, save_file

    if not file.is_file():
        seeds = tqdm(range(TRAINING_SEED, TRAINING_SEED + PICTURES), desc="objects", mininterval=10)
        masks = torch.stack([torch.from_numpy(world.mask(world.sample(seed))).half() for seed in seeds])
        save_file({"coverage": nn.functional.avg_pool2d(masks[:, None].float(), 8).half()}, file)
    return 1 + OBJECT_WEIGHT * load_file(file)["coverage"]


def _protect_from_inplace(text: nn.Module) -> None:
    """ComfyUI adds to the residual stream in place; autograd needs what its LayerNorms saw, so give those a copy."""
    for layer in text.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(), *inputs[1:]))


def caption(factors: world.Factors, rng: np.random.Generator) -> str:
    """The picture's caption, words left out at random; a shape left out is called "shape"."""
    if rng.random() < DROP_ALL:
        return ""
    colour, texture, shape, background = rng.random(4) < DROP_WORD
    words = ["a"]
    words += [] if colour else [factors.appearance.colour]
    words += [] if texture else [factors.appearance.texture]
    words += ["shape" if shape else factors.shape]
    words += [] if background else ["on", factors.background]
    return " ".join(words)


def _patcher(base: nn.Module) -> comfy.model_patcher.ModelPatcher:
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(base, load_device=device, offload_device=device)
