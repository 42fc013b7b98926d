"""Which part of one picture belongs to which part of another, by the demo model's own queries and keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.generate import encode_prompts
from demo.model import load_demo_model
from inversion_core.correspondence import Grid, SparseMap


class OwnMatching:
    """The demo model, whose self-attentions tell their queries and keys."""

    def __init__(self) -> None:
        self._demo = load_demo_model()
        self._context = encode_prompts(self._demo, [""])[0][0]
        self._found: dict[str, dict[str, Tensor]] = {}
        self._heads: dict[str, int] = {}
        unet: Any = self._demo.model.model.diffusion_model
        for name, module in unet.named_modules():
            if name.endswith("attn1"):
                site = _site(name)
                self._heads[site] = module.heads
                for role in ("to_q", "to_k"):
                    getattr(module, role).register_forward_hook(partial(self._keep, site, role))

    def _keep(self, site: str, role: str, _module: Any, _given: Any, told: Tensor) -> None:
        self._found.setdefault(site, {})[role] = told

    def encoded(self, pictures: Sequence[Tensor]) -> Tensor:
        """Output and reference, (1, 3, H, W) in [0, 1] each -> their latents (2, 4, h, w)."""
        return torch.cat([self._demo.vae.encode(one.movedim(1, -1)) for one in pictures])

    def maps(self, latents: Tensor, mask: Tensor, percent: float, seed: int) -> dict[str, tuple[Grid, SparseMap]]:
        """By site its grid and the map, most-read token first.

        Args:
            latents: of output and reference, as `encoded` gives them.
            mask: (1, 1, H, W), what of the reference may be read.
            percent: place in the schedule.
            seed: of the noise, which is not the same for both.
        """
        base = self._demo.model.model
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
        sigma = base.model_sampling.sigma_max if percent == 0 else base.model_sampling.percent_to_sigma(percent)
        sigma = torch.as_tensor(float(sigma)).reshape(1)
        noisy = base.model_sampling.noise_scaling(sigma, noise, base.process_latent_in(latents))
        timestep = base.model_sampling.timestep(sigma).float().expand(2)
        given = base.model_sampling.calculate_input(sigma, noisy)
        base.diffusion_model(given, timestep, context=self._context.expand(2, -1, -1))
        return {site: self._map(site, mask, latents.shape[-2] / latents.shape[-1]) for site in self._found}

    def _map(self, site: str, mask: Tensor, aspect: float) -> tuple[Grid, SparseMap]:
        heads = self._heads[site]
        q, k = (self._found[site][role].float().unflatten(2, (heads, -1)).transpose(1, 2) for role in ("to_q", "to_k"))
        width = round(math.sqrt(q.shape[2] / aspect))
        grid = (q.shape[2] // width, width)
        weight = F.interpolate(mask, size=grid, mode="area").flatten()
        scores = q[0] @ k[1].transpose(1, 2) / math.sqrt(q.shape[-1]) + weight.log()
        share, index = scores.softmax(dim=-1).mean(0).sort(dim=1, descending=True)
        return grid, SparseMap(index, share)


def _site(name: str) -> str:
    """A self-attention as the pack calls it, from its name in the UNet: `output_blocks.2.1.transformer_blocks.0.attn1`
    is `output.2.0`."""
    part, number, *_, index, _ = name.split(".")
    return f"{part.split('_')[0]}.{0 if part == 'middle_block' else number}.{index}"
