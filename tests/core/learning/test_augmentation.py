"""What stays the same in a variant and what does not."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from inversion_core.learning.augmentation import COLOURS, TEXTURES, Variant, with_new_geometry, with_new_surface

Augmentation = Callable[[Tensor, Tensor, np.random.Generator], Variant]
BOTH = pytest.mark.parametrize("augment", [with_new_surface, with_new_geometry])
BLUE = (0.1, 0.2, 0.9)
YELLOW = (0.9, 0.8, 0.1)


def disc(height: int = 48, width: int = 48) -> tuple[Tensor, Tensor]:
    """A disc striped in blue and yellow on grey."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    mask = ((y - height / 2) ** 2 + (x - width / 2) ** 2 < (min(height, width) / 3) ** 2).float()[None]
    stripes = (x // 4 % 2).float()[None]
    paint = torch.tensor(BLUE)[:, None, None] * stripes + torch.tensor(YELLOW)[:, None, None] * (1 - stripes)
    return paint * mask + 0.5 * (1 - mask), mask


def variants(augment: Augmentation, count: int = 24, *size: int) -> list[Variant]:
    return [augment(*disc(*size), np.random.default_rng(seed)) for seed in range(count)]


def mean_inside(variant: Variant) -> Tensor:
    return (variant.picture * variant.mask).flatten(1).sum(1) / variant.mask.sum()


@BOTH
@pytest.mark.parametrize("size", [(48, 48), (40, 56), (16, 16)])
def test_variants_are_pictures_and_masks_with_an_object(augment: Augmentation, size: tuple[int, int]) -> None:
    for variant in variants(augment, 16, *size):
        assert variant.picture.shape == (3, *size)
        assert variant.mask.shape == (1, *size)
        for tensor in (variant.picture, variant.mask):
            assert bool(torch.isfinite(tensor).all())
            assert float(tensor.min()) >= 0
            assert float(tensor.max()) <= 1
        assert float(variant.mask.max()) > 0.9


@BOTH
def test_a_variant_is_a_function_of_its_generator(augment: Augmentation) -> None:
    torch.manual_seed(1)
    first = variants(augment, 4)
    torch.manual_seed(2)
    second = variants(augment, 4)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.picture, b.picture)
        assert torch.equal(a.mask, b.mask)
        assert a.words == b.words
    assert not torch.equal(first[0].picture, first[1].picture)


def test_a_new_surface_keeps_the_outline_and_says_what_it_painted() -> None:
    """A disc stays a disc: as wide as high, and filled."""
    for variant in variants(with_new_surface):
        inside = variant.mask[0] > 0.5
        rows, columns = inside.any(1).sum(), inside.any(0).sum()
        assert abs(int(rows) - int(columns)) <= 2
        assert float(inside.sum()) == pytest.approx(np.pi / 4 * float(rows) * float(columns), rel=0.1)
        colour, texture = variant.words.split()
        assert colour in COLOURS
        assert texture in TEXTURES


def test_a_new_surface_has_the_colour_its_words_say() -> None:
    for variant in variants(with_new_surface):
        found = mean_inside(variant)
        hue = found - found.mean()
        distances = {}
        for name, rgb in COLOURS.items():
            wanted = torch.tensor(rgb)
            distances[name] = 1 - float(torch.cosine_similarity(hue, wanted - wanted.mean(), dim=0))
        # Neighbouring names (red and orange, cyan and blue) may change places, far ones not.
        assert distances[variant.words.split()[0]] < 0.15 + min(distances.values())


def test_new_surfaces_share_no_colour() -> None:
    means = torch.stack([mean_inside(variant) for variant in variants(with_new_surface)])
    assert float(means.std(0).min()) > 0.15


def test_a_new_geometry_keeps_the_colours() -> None:
    """Every pixel inside lies between the two tones, and both are there."""
    blue, yellow = torch.tensor(BLUE), torch.tensor(YELLOW)
    axis = yellow - blue
    for variant in variants(with_new_geometry):
        pixels = variant.picture.flatten(1)[:, variant.mask.flatten() > 0.99].T
        share = ((pixels - blue) @ axis) / (axis @ axis)
        away = (pixels - blue - share[:, None] * axis).norm(dim=1)
        assert float(away.quantile(0.9)) < 0.15
        assert float(share.max() - share.min()) > 0.5


def test_a_new_geometry_changes_the_outline() -> None:
    masks = torch.stack([variant.mask.flatten() > 0.5 for variant in variants(with_new_geometry)])
    own = disc()[1].flatten() > 0.5
    overlap = (masks & own).sum(1) / (masks | own).sum(1)
    assert float(overlap.median()) < 0.85
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)


@pytest.mark.parametrize(("place", "radius"), [((12, 14), 6), ((30, 26), 10), ((24, 24), 20)])
def test_a_shape_comes_to_the_middle_at_one_size_wherever_it_was(place: tuple[int, int], radius: int) -> None:
    y, x = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    mask = ((y - place[0]) ** 2 + (x - place[1]) ** 2 < radius**2).float()[None]
    for seed in range(8):
        found = with_new_surface(torch.rand(3, 48, 48), mask, np.random.default_rng(seed)).mask[0] > 0.5
        rows, columns = torch.nonzero(found.any(1)).flatten(), torch.nonzero(found.any(0)).flatten()
        for side in (rows, columns):
            assert abs(float(side.float().mean()) - 23.5) <= 3
            # 0.75 of 48 pixels, but a disc of 12 pixels grows no more than twice.
            assert abs(len(side) - min(36, 4 * radius)) <= 5


def test_a_shape_stays_where_it_is_if_asked_and_all_else_changes() -> None:
    picture, mask = disc()
    found = [with_new_surface(picture, mask, np.random.default_rng(seed), centred=False) for seed in range(16)]
    assert all(torch.equal(variant.mask, mask) for variant in found)
    means = torch.stack([mean_inside(variant) for variant in found])
    corners = torch.stack([variant.picture[:, 0, 0] for variant in found])
    assert min(float(means.std(0).min()), float(corners.std(0).min())) > 0.1


def test_an_appearance_keeps_edges_as_sharp_as_they_were() -> None:
    """Stripes of two tones: tiled and warped, most pixels still have one of them, not a blend."""
    for seed in range(12):
        variant = with_new_geometry(*disc(96, 96), np.random.default_rng(seed))
        pixels = variant.picture.permute(1, 2, 0)[variant.mask[0] > 0.99]
        tones = torch.stack([(pixels - torch.tensor(tone)).abs().amax(1) for tone in (BLUE, YELLOW)])
        assert float((tones.amin(0) < 0.15).float().mean()) > 0.6
