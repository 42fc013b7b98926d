"""What nodes do with ComfyUI's values, where no server is needed; the pack is loaded as ComfyUI loads it."""

# ruff: noqa: E402
from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from demo.comfy import PACK, ensure_importable

ensure_importable()

NAME = "pack_in_process"


def module(name: str) -> ModuleType:
    """A module of the pack as a custom node, such as `nodes.host`."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            NAME, PACK / "__init__.py", submodule_search_locations=[str(PACK)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    return importlib.import_module(f"{NAME}.{name}")


class VideoVAE:
    """As ComfyUI's VAE for Wan and Qwen-Image: a picture is a video of one frame, 8 times smaller."""

    def __init__(self, frames: int = 1) -> None:
        self.frames = frames

    def encode(self, pixels: Tensor) -> Tensor:
        small = pixels[:, ::8, ::8].movedim(-1, 1)[:, :, None]
        return torch.cat([small] * 5 + [small[:, :1]], dim=1).expand(-1, -1, self.frames, -1, -1)


def encoded(vae: Any, picture: Tensor, mask: Tensor | None, flatten: float = 0.0) -> Any:
    return module("nodes.host").encode_reference(picture, vae, mask, flatten)


def test_a_video_models_vae_gives_a_reference_too() -> None:
    picture, mask = torch.rand(1, 32, 48, 3), torch.zeros(1, 32, 48)
    mask[:, :, :16] = 1
    reference = encoded(VideoVAE(), picture, mask)
    assert torch.equal(reference.latent, VideoVAE().encode(picture)[:, :, 0])
    assert torch.equal(reference.mask[0, 0], torch.tensor([[1.0, 1, 0, 0, 0, 0]] * 4))


def test_a_video_is_no_reference() -> None:
    with pytest.raises(ValueError, match="references need an image VAE"):
        encoded(VideoVAE(2), torch.rand(1, 32, 48, 3), None)


def swatches(sheet: Tensor, panel: int) -> Tensor:
    """The colour of every pixel along the middle of a panel's bar: (256, 3)."""
    preview = module("nodes.color_preview")
    left = preview.GAP + panel * (preview.SIDE + preview.GAP)
    return sheet[0, -preview.GAP - preview.BAR // 2, left : left + preview.SIDE]


def test_the_preview_shows_every_palette_as_wide_as_its_shares() -> None:
    """A picture 3/4 red, 1/4 blue, of which the mask leaves half red, half blue; after: green; reference: grey."""
    before, after = torch.zeros(8, 64, 3), torch.zeros(8, 64, 3)
    before[:, :48, 0], before[:, 48:, 2] = 0.8, 0.8
    after[..., 1] = 0.5
    reference, mask = torch.full((20, 10, 4), 0.25), torch.zeros(1, 8, 64)
    mask[:, :, 32:] = 1

    sheet = module("nodes.color_preview").preview_sheet(before, after, reference, mask, None)
    whole = module("nodes.color_preview").preview_sheet(before, after, reference, None, None)

    assert sheet.ndim == 4 and sheet.shape[-1] == 3 and sheet.min() >= 0 and sheet.max() <= 1
    for found, split in ((swatches(sheet, 0), 128), (swatches(whole, 0), 192)):
        colours, counts = (found * 255).round().unique(dim=0, return_counts=True)
        assert dict(zip(map(tuple, colours.tolist()), counts.tolist(), strict=True)) == {
            (204.0, 0.0, 0.0): split,
            (0.0, 0.0, 204.0): 256 - split,
        }
    for panel, colour in ((1, (0, 0.5, 0)), (2, (0.25, 0.25, 0.25))):
        torch.testing.assert_close(swatches(sheet, panel), torch.tensor([colour]).expand(256, 3), rtol=0, atol=0.003)


def test_a_flattened_shape_keeps_its_outline_and_loses_its_texture() -> None:
    picture, mask = torch.rand(1, 32, 48, 3), torch.zeros(1, 32, 48)
    mask[:, 8:24, 8:24] = 1
    flattened = module("nodes.picture_mask").flattened
    assert torch.equal(flattened(picture, mask, 0.0), picture)
    flat = flattened(picture, mask, 1.0)
    inside = mask[0] > 0
    assert torch.equal(flat[0][~inside], picture[0][~inside])
    mean = picture[0][inside].mean(0).expand(256, 3)
    torch.testing.assert_close(flat[0][inside], mean)
    torch.testing.assert_close(flattened(picture, mask, 0.5)[0][inside], (picture[0][inside] + mean) / 2)
    whole, half = (encoded(VideoVAE(), picture, mask, share) for share in (0.0, 1.0))
    assert not torch.equal(whole.latent, half.latent)
    with pytest.raises(ValueError, match="flatten is 1.0, but there is no mask"):
        encoded(VideoVAE(), picture, None, 1.0)
