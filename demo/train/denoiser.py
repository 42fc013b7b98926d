"""Stage 2: the UNet and its text encoder together, on cached latents of the training vocabulary."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import numpy as np
import torch
from torch import Tensor, nn

from ..denoiser import build_denoiser
from ..model import load_vae
from ..text import clip_target
from ..weights import DENOISER, TEXT_ENCODER, load_weights, save_weights
from .data import reset
from .latents import Latents
from .loop import Recipe
from .samples import as_demo, write_samples


class DenoiserStage:
    """v-prediction, uniform timesteps. Words are dropped at random, so that captions may leave things open."""

    def __init__(self, device: torch.device, steps: int = 9000, runs: Path = Path("runs")) -> None:
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
        self.demo = as_demo(self.base, self.clip, load_vae())
        self.latents = Latents(runs, self.demo.vae, device)

    def warm_start(self) -> None:
        """Begin with the committed weights instead of random ones."""
        self.base.diffusion_model.load_state_dict(load_weights(DENOISER))
        self.clip.cond_stage_model.load_state_dict(load_weights(TEXT_ENCODER))

    def loss(self, step: int) -> Tensor:
        rng = np.random.default_rng([2, step])
        batch = self.latents.draw(rng, step)
        count = len(batch.chosen)
        timestep = torch.from_numpy((np.arange(count) + rng.random()) / count * 1000).long().to(self.device)
        sigma = self.base.model_sampling.sigmas.to(self.device)[timestep].view(-1, 1, 1, 1)
        alpha = (1 + sigma**2).rsqrt()
        noisy = alpha * batch.clean + alpha * sigma * batch.noise
        target = alpha * batch.noise - alpha * sigma * batch.clean
        with torch.autocast(self.device.type, torch.bfloat16):
            context = self._encode(self.latents.captions(batch, rng))
            made = self.model["unet"](noisy, timestep.float(), context=context)
        return batch.error(made, target)

    def _encode(self, captions: list[str]) -> Tensor:
        tokens = [self.clip.tokenize(text)["l"][0] for text in captions]
        ids = torch.tensor([[token for token, _ in row] for row in tokens], device=self.device)
        return self.clip.cond_stage_model.clip_l.transformer(ids)[0].float()

    def samples(self, folder: Path, step: int) -> str:
        return write_samples(self.demo, folder / f"{step:06d}.png")

    def export(self) -> None:
        save_weights(DENOISER, self.model["unet"].state_dict())
        save_weights(TEXT_ENCODER, self.model["text"].state_dict())


def _protect_from_inplace(text: nn.Module) -> None:
    """ComfyUI adds to the residual stream in place; autograd needs what its LayerNorms saw, so give those a copy."""
    for layer in text.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(), *inputs[1:]))
