"""References, and the bank that keeps what the model saw in them."""

import copy
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from torch import Tensor

from inversion_core.reference import Reference, ReferenceBank


def latent(height: int = 6, width: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(seed))


def entry(*sizes: int, dtype: torch.dtype = torch.float32) -> dict:
    return {i: torch.zeros(size, dtype=dtype) for i, size in enumerate(sizes)}


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


def test_the_bank_returns_what_it_was_given_and_counts() -> None:
    bank = ReferenceBank(1000)
    kept = entry(3, 4)
    bank.put("a", kept)

    assert bank.get("a") is kept
    assert bank.get("b") is None
    assert (bank.hits, bank.misses) == (1, 1)


def test_bytes_are_those_of_the_tensors_dtype() -> None:
    bank = ReferenceBank(10_000)
    bank.put("a", entry(10, 5))
    assert bank.bytes == 60
    bank.put("b", entry(10, dtype=torch.float16))
    assert bank.bytes == 80


def test_putting_a_key_again_replaces_it() -> None:
    bank = ReferenceBank(100)
    bank.put("a", entry(20))
    newer = entry(5)
    bank.put("a", newer)
    assert bank.get("a") is newer
    assert bank.bytes == 20


def test_the_least_recently_used_goes_first() -> None:
    bank = ReferenceBank(120)
    for key in ("a", "b", "c"):
        bank.put(key, entry(10))
    assert bank.get("a") is not None  # now b is the oldest
    bank.put("d", entry(10))

    assert [key for key in ("a", "b", "c", "d") if bank.get(key) is not None] == ["a", "c", "d"]
    assert bank.bytes == 120


def test_a_large_entry_drops_as_many_as_it_must_and_no_more() -> None:
    bank = ReferenceBank(120)
    for key in ("a", "b", "c"):
        bank.put(key, entry(10))
    bank.put("d", entry(15))
    assert [key for key in ("a", "b", "c", "d") if bank.get(key) is not None] == ["c", "d"]


def test_an_entry_of_exactly_the_budget_is_kept_and_one_above_it_drops_nothing() -> None:
    bank = ReferenceBank(40)
    bank.put("a", entry(10))
    assert bank.get("a") is not None
    bank.put("b", entry(11))
    assert bank.get("b") is None
    assert bank.get("a") is not None
    assert bank.bytes == 40


def test_a_bank_without_budget_keeps_nothing_and_a_negative_one_is_refused() -> None:
    bank = ReferenceBank(0)
    bank.put("a", entry(1))
    assert bank.get("a") is None
    with pytest.raises(ValueError, match="budget is -1 bytes"):
        ReferenceBank(-1)


def test_the_books_balance_whatever_happens() -> None:
    """Against a model of the bank so simple that it is right at sight."""
    rng = np.random.default_rng(0)
    bank, model = ReferenceBank(200), []
    for _ in range(500):
        key, size = int(rng.integers(6)), 4 * int(rng.integers(0, 60))
        if rng.random() < 0.5:
            found = bank.get(key)
            assert (found is not None) == (key in dict(model))
            model = [pair for pair in model if pair[0] != key] + [pair for pair in model if pair[0] == key]
        else:
            bank.put(key, entry(size // 4))
            model = [pair for pair in model if pair[0] != key]
            if size <= 200:
                model.append((key, size))
                while sum(size for _, size in model) > 200:
                    model.pop(0)
        assert bank.bytes == sum(size for _, size in model) <= 200
