"""Stage 5: the diffusion transformer, on the cached latents, with the committed text encoder as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..dit import build_dit
from ..model import load_clip, load_vae
from ..weights import DIT, load_weights, save_weights
from .data import reset
from .latents import Latents
from .loop import Recipe
from .samples import as_demo, write_samples


class DitStage:
    """Rectified flow (Liu et al. 2022, arXiv 2209.03003), noise levels uniform."""

    def __init__(
        self, device: torch.device, steps: int = 18_000, runs: Path = Path("runs"), *, compiled: bool = False
    ) -> None:
        self.recipe = Recipe("dit", steps=steps, learning_rate=1.5e-3, ema=0.999, samples_every=1000)
        self.device = device
        torch.manual_seed(5)
        self.base = build_dit()
        self.model = self.base.diffusion_model
        _initialise(self.model)
        self.model.train().to(device)
        self.network = torch.compile(self.model) if compiled else self.model
        self.demo = as_demo(self.base, load_clip(), load_vae())
        self.latents = Latents(runs, self.demo.vae, device)
        self.encoded: dict[str, tuple[Tensor, Tensor]] = {}

    def warm_start(self) -> None:
        """Begin with the committed weights instead of random ones."""
        self.model.load_state_dict(load_weights(DIT))

    def loss(self, step: int) -> Tensor:
        rng = np.random.default_rng([5, step])
        batch = self.latents.draw(rng, step)
        count = len(batch.chosen)
        # As the demo's UNet, and not logit-normal as SD3: that trains little where almost all is noise, and there the
        # outline should be decided (docs/demo-model.md).
        even = torch.from_numpy((np.arange(count) + 1 - rng.random()) / count)
        sigma = even.float().view(-1, 1, 1, 1).to(self.device)
        noisy = sigma * batch.noise + (1 - sigma) * batch.clean
        context, pooled = self._encode(self.latents.captions(batch, rng))
        timestep = self.base.model_sampling.timestep(sigma).flatten()
        with torch.autocast(self.device.type, torch.bfloat16):
            made = self.network(noisy, timestep, context=context, y=pooled)
        return batch.error(made, batch.noise - batch.clean)

    @torch.no_grad()
    def _encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """What CLIP Text Encode gives for these captions; each caption is encoded once."""
        clip = self.demo.clip
        for text in captions:
            if text not in self.encoded:
                self.encoded[text] = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
        rows, pooled = zip(*(self.encoded[text] for text in captions), strict=True)
        return torch.cat(rows).to(self.device), torch.cat(pooled).to(self.device)

    def samples(self, folder: Path, step: int) -> str:
        return write_samples(self.demo, folder / f"{step:06d}.png")

    def export(self) -> None:
        save_weights(DIT, self.model.state_dict())


def _initialise(model: nn.Module) -> None:
    """Every block begins as the identity and the prediction as zero (adaLN-Zero: Peebles & Xie 2023, 2212.09748)."""
    reset(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            nn.init.zeros_(parameter)
        elif name.endswith((".ln_q.weight", ".ln_k.weight")):
            nn.init.ones_(parameter)
