"""References: images as the model sees them."""

import copy
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor

from inversion_core.noise import Trajectory
from inversion_core.reference import Reference


def latent(height: int = 6, width: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(2, 4, 6, 6), (4, 6, 6), (1, 4, 1, 6, 6), (0, 4, 6, 6)])
def test_only_one_image_is_a_reference(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"\(1, C, h, w\).*{', '.join(map(str, shape))}.*one by one"):
        Reference(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 1, 4, 6), (6, 4), (1, 6, 4), (2, 1, 6, 4), (1, 1, 48, 32)])
def test_the_mask_must_lie_on_the_latents_grid(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"mask is .*\(1, 1, 6, 4\)"):
        Reference(latent(6, 4), torch.ones(shape))


def test_an_empty_mask_is_refused() -> None:
    """Hosts read where the mask is largest: an empty one would mean everywhere."""
    with pytest.raises(ValueError, match="mask is empty"):
        Reference(latent(), torch.zeros(1, 1, 6, 4))


def test_a_reference_cannot_be_changed_and_copies_are_the_same_object() -> None:
    reference = Reference(latent())
    with pytest.raises(FrozenInstanceError):
        reference.noise_seed = 1  # pyright: ignore[reportAttributeAccessIssue]
    assert copy.deepcopy({"model": [reference]})["model"][0] is reference


def test_the_noise_depends_on_the_seed_alone() -> None:
    expected = torch.randn(1, 4, 6, 4, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(1)
    first = Reference(latent(), noise_seed=5).noise()
    torch.manual_seed(2)
    second = Reference(latent(seed=9), noise_seed=5).noise()

    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert not torch.equal(Reference(latent(), noise_seed=6).noise(), expected)


def test_the_noise_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    Reference(latent()).noise()
    assert torch.equal(torch.get_rng_state(), before)


def test_equal_content_has_the_equal_key_whatever_the_object_or_the_memory_layout() -> None:
    transposed = latent(4, 6).transpose(2, 3)
    assert not transposed.is_contiguous()
    assert Reference(transposed).content == Reference(transposed.contiguous()).content
    assert Reference(latent().half()).content == Reference(latent().half().float()).content


def test_different_content_has_different_keys() -> None:
    flat = torch.arange(24.0)
    references = [
        Reference(latent()),
        Reference(latent(), noise_seed=1),
        Reference(latent(seed=1)),
        Reference(flat.reshape(1, 1, 4, 6)),
        Reference(flat.reshape(1, 1, 6, 4)),
        Reference(flat.reshape(1, 4, 2, 3)),
    ]
    assert len({reference.content for reference in references}) == len(references)


def test_the_mask_is_no_part_of_the_key() -> None:
    """What the model sees in a picture does not depend on which part of it is read afterwards."""
    assert Reference(latent(), torch.ones(1, 1, 6, 4)).content == Reference(latent()).content


def trajectory(seed: int = 1, *, high: float = 8.0, height: int = 6) -> Trajectory:
    noise = torch.cat([latent(height, seed=seed), latent(height, seed=seed + 1), torch.zeros(1, 4, height, 4)])
    sigmas = torch.tensor([high, 2.0, 0.0])
    return Trajectory(sigmas, latent(height) + sigmas.view(3, 1, 1, 1) * noise)


def test_the_noise_at_a_level_is_the_trajectorys_or_else_the_fixed_noise() -> None:
    plain, inverted = Reference(latent()), Reference(latent(), trajectory=trajectory())
    for sigma in (0.0, 1.0, 5.0, 20.0):
        assert torch.equal(plain.noise_at(sigma), plain.noise())
        assert torch.equal(inverted.noise_at(sigma), trajectory().noise_at(sigma))
    torch.testing.assert_close(inverted.noise_at(8.0), latent(seed=1))
    torch.testing.assert_close(inverted.noise_at(2.0), latent(seed=2))


def test_the_trajectory_is_part_of_the_key() -> None:
    choices = [None, trajectory(), trajectory(seed=2), trajectory(high=9.0)]
    assert len({Reference(latent(), trajectory=choice).content for choice in choices}) == len(choices)
    assert Reference(latent(), trajectory=trajectory()).content == Reference(latent(), trajectory=trajectory()).content


def test_a_trajectory_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trajectory is of a latent \(1, 4, 5, 4\).*\(1, 4, 6, 4\).*invert this"):
        Reference(latent(), trajectory=trajectory(height=5))
