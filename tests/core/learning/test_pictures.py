"""Pictures and masks in the size that is learned at."""

import pytest
import torch

from inversion_core.learning.model import LearningError
from inversion_core.learning.pictures import fitted


@pytest.mark.parametrize(
    ("given", "size", "found"),
    [
        ((512, 512), 512, (512, 512)),
        ((600, 900), 512, (320, 512)),
        ((64, 64), 512, (64, 64)),
        ((70, 130), 512, (64, 128)),
        ((63, 20), 512, (56, 16)),
        ((8, 8), 512, (8, 8)),
    ],
)
def test_sides_become_even_and_nothing_is_enlarged(given: tuple[int, int], size: int, found: tuple[int, int]) -> None:
    pictures, masks = fitted(torch.rand(2, *given, 3), torch.rand(2, *given), size)
    assert pictures.shape == (2, *found, 3)
    assert masks.shape == (2, *found)


def test_the_centre_is_kept_and_masks_go_with_their_pictures() -> None:
    masks = torch.zeros(1, 70, 130)
    masks[:, 3:67, 1:129] = 1
    pictures, cut = fitted(masks[..., None].expand(-1, -1, -1, 3), masks, 512)
    assert bool((cut == 1).all())
    assert bool((pictures == 1).all())


@pytest.mark.parametrize("shape", [(7, 64), (64, 7), (0, 0), (4000, 20)])
def test_pictures_of_which_nothing_is_left_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(LearningError, match="8x8 is the least"):
        fitted(torch.zeros(1, *shape, 3), torch.zeros(1, *shape), 512)
