"""Fitting what covers the whole picture to the part of it that a call of the model sees."""

import pytest
import torch

from inversion_core.hosts.base import Crop, Grid, map_to_tokens, mask_to_tokens, tokens_to_map


def ramp(height: int, width: int) -> torch.Tensor:
    """Each cell says where it is: channel 0 the row, channel 1 the column, both as fractions at the cell's centre."""
    rows = ((torch.arange(height) + 0.5) / height)[:, None].expand(height, width)
    columns = ((torch.arange(width) + 0.5) / width)[None].expand(height, width)
    return torch.stack((rows, columns))[None]


def test_tokens_are_rows_of_the_map() -> None:
    maps = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    tokens = map_to_tokens(maps)
    assert torch.equal(tokens[1, 2 * 5 + 3], maps[1, :, 2, 3])
    assert torch.equal(tokens_to_map(tokens, Grid(4, 5)), maps)


def test_a_token_has_the_share_of_the_mask_it_covers() -> None:
    mask = torch.zeros(1, 1, 4, 8)
    mask[..., :3] = 1
    assert mask_to_tokens(mask, Grid(2, 4)).tolist() == [[1, 0.5, 0, 0] * 2]


def test_the_whole_picture_is_not_cropped() -> None:
    size = Grid(16, 24)
    assert torch.equal(Crop(0, 0, size, size).of(ramp(16, 24), size, "bilinear"), ramp(16, 24))


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("mode", ["bilinear", "area"])
def test_a_crop_is_cut_where_it_lies(stride: int, mode: str) -> None:
    crop = Crop(8, 16, Grid(8, 12), Grid(16, 32))
    cut = crop.of(ramp(32, 64), Grid(8 // stride, 12 // stride), mode)
    rows = (torch.arange(8 // stride) * stride + 8 + stride / 2) / 16
    columns = (torch.arange(12 // stride) * stride + 16 + stride / 2) / 32
    quarter_cell = stride / 16 / 4  # at the border of the picture a smooth resize is off a little
    torch.testing.assert_close(cut[0, 0, :, 0], rows, atol=quarter_cell, rtol=0)
    torch.testing.assert_close(cut[0, 1, 0], columns, atol=quarter_cell, rtol=0)


@pytest.mark.parametrize("full", [7, 16, 19])
def test_a_crop_always_has_the_grids_size(full: int) -> None:
    """Sizes that do not divide: a UNet halves them, rounding up."""
    for size in range(1, full + 1):
        for top in range(full - size + 1):
            for side in (size, -(-size // 2), -(-size // 4)):
                cut = Crop(top, 0, Grid(size, 5), Grid(full, 5)).of(ramp(full, 5), Grid(side, 5), "bilinear")
                assert cut.shape[-2:] == (side, 5)
