"""From a picture to a result on models of 16-channel and of video latents: Encode Reference with ComfyUI's own VAEs,
then KV Injection and AdaIN Color Guidance on its own transformers. All weights are random."""

from __future__ import annotations

from typing import Any

import comfy.ldm.wan.vae
import comfy.sd
import comfy.taesd.taesd
import pytest
import torch
from torch import Tensor

from inversion_core.attention import AttentionEdit
from inversion_core.hosts import comfy_color
from inversion_core.hosts.comfy_color import ColorGuidance
from inversion_core.hosts.comfy_injection import attach, last_report
from inversion_core.injection import Injection, Window
from inversion_core.reference import Reference

from .dit_models import KINDS
from .models import sample
from .test_nodes_in_process import encoded

PICTURE = torch.rand(1, 80, 112, 3, generator=torch.Generator().manual_seed(1))
MASK = torch.zeros(1, 80, 112)
MASK[:, :, :64] = 1


def taesd16() -> comfy.sd.VAE:
    """As taef1 and taesd3: 16 channels, 8 times smaller."""
    torch.manual_seed(0)
    weights = comfy.taesd.taesd.TAESD(latent_channels=16).state_dict()
    return comfy.sd.VAE(sd=filled(weights))


def wan_vae() -> comfy.sd.VAE:
    """Wan 2.1's and Qwen-Image's, with fewer channels inside: a picture becomes (1, 16, 1, h, w)."""
    size: dict[str, Any] = {"dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    size |= {"attn_scales": [], "temperal_downsample": [False, True, True], "dropout": 0.0}
    return comfy.sd.VAE(sd=filled(comfy.ldm.wan.vae.WanVAE(**size).state_dict()))


def filled(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI's layers leave their weights as the memory was."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, value in weights.items():
        drawn = torch.randn(value.shape, generator=generator)
        made[name] = drawn / max(1, value[:1].numel()) ** 0.5 if value.ndim > 1 else drawn * 0.1 + 1
    return made


VAES = {"flux": taesd16, "sd3": taesd16, "qwen": wan_vae, "wan": wan_vae, "wan-video": wan_vae}


@pytest.fixture(autouse=True)
def as_in_a_node() -> Any:
    with torch.inference_mode():
        yield


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    flat = x.double().flatten(1)
    return flat.mean(dim=1), flat.std(dim=1, correction=0)


@pytest.mark.parametrize("name", VAES)
def test_an_encoded_picture_is_read_and_its_colours_are_taken(name: str) -> None:
    kind, vae = KINDS[name], VAES[name]()
    reference: Any = encoded(vae, PICTURE, MASK)
    assert reference.latent.shape == (1, 16, 10, 14)
    assert torch.equal(reference.mask[0, 0], torch.cat((torch.ones(10, 8), torch.zeros(10, 6)), dim=1))
    # The node's own module is loaded under another name than this test's.
    reference = Reference(reference.latent, reference.mask)

    model, noise = kind.build(), kind.noise(1)
    asked: dict[str, Any] = {"positive": kind.prompt(101), "negative": kind.prompt(102), "noise": noise, "steps": 2}
    plain = sample(model, **asked)
    injected = attach(model, Injection(AttentionEdit(), (reference,), sites="all"))
    coloured = comfy_color.attach(injected, ColorGuidance(reference, window=Window(0.0, 1.0)))

    read = sample(injected, **asked)
    assert read.shape == noise.shape and torch.isfinite(read).all()
    assert (read - plain).abs().max() > 1e-2
    assert set(last_report(injected).calls) == set(kind.sites)

    # Matched to what the VAE gave inside the mask, over all frames together.
    out = sample(coloured, **asked)
    for found, wanted in zip(moments(out[0]), moments(reference.latent[0, :, :, :8]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=5e-3)
    assert not torch.allclose(out, read, atol=0.05)
