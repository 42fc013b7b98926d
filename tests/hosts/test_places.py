"""Where a rotary transformer sees references: numbers of places, without a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inversion_core.hosts import places as places_module
from inversion_core.hosts.base import Crop, Grid, HostError
from inversion_core.hosts.places import Place, Places, turned

SEEN, PICTURE = Grid(5, 7), Grid(6, 8)


def places(first: int, centred: bool) -> tuple[Places, list[Place]]:
    asked: list[Place] = []

    def move(x: Tensor, by: Place) -> Tensor:
        asked.append(by)
        return x + 1

    return Places(first, centred, move), asked


@pytest.mark.parametrize("centred", [False, True])
def test_beside_lies_left_of_the_picture_and_touches_it(centred: bool) -> None:
    """Columns as the model counts them: the reference's last is one before the picture's first."""
    for seen, picture in ((SEEN, PICTURE), (PICTURE, SEEN), (Grid(3, 3), Grid(4, 9))):
        subject, asked = places(0, centred)
        subject.beside(torch.zeros(1), seen, picture)
        last = (-(seen.width // 2) if centred else 0) + seen.width - 1
        first = -(picture.width // 2) if centred else 0
        assert asked == [(0, 0, first - 1 - last)]


def test_what_does_not_move_is_the_very_tensor() -> None:
    x = torch.zeros(1)
    subject, asked = places(0, True)
    assert subject.kept(x) is x and subject.over(x) is x
    assert subject.within(x, seen=PICTURE, crop=Crop(0, 0, Grid(12, 16), Grid(12, 16)), picture=PICTURE) is x
    assert asked == []


def test_frames_are_kept_from_zero_and_read_from_the_pictures_own() -> None:
    kept, at_capture = places(8, False)
    read, at_reading = places(41, False)
    read.over(kept.kept(torch.zeros(1)))
    read.beside(torch.zeros(1), SEEN, PICTURE)
    assert (at_capture, at_reading) == ([(-8, 0, 0)], [(41, 0, 0), (41, 0, -7)])


def test_a_part_that_cuts_a_token_is_refused() -> None:
    subject, _ = places(0, False)
    with pytest.raises(HostError, match=r"7 x 6 latent cells.*multiples of 16 pixels"):
        subject.within(torch.zeros(1), seen=PICTURE, crop=Crop(0, 0, Grid(7, 6), Grid(12, 16)), picture=Grid(4, 3))


@pytest.mark.parametrize("devices", [("cpu",), ()])
def test_turns_add_up_and_leave_lengths_alone(devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """By complex numbers and without."""
    monkeypatch.setattr(places_module, "COMPLEX", devices)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    angles = torch.tensor([[0.3, -1.0, 2.0], [1.1, 0.4, -0.7]])

    def turn(angle: Tensor) -> Tensor:
        return torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), dim=-1).unflatten(-1, (2, 2))

    first, second = (turn(angle) for angle in angles)
    together = turn(angles.sum(dim=0))
    torch.testing.assert_close(turned(turned(x, first), second), turned(x, together))
    torch.testing.assert_close(turned(x, first).norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(turned(x, first), x)
    expected = torch.einsum("pij,bnhpj->bnhpi", first, x.unflatten(2, (-1, 3, 2))).flatten(2)
    torch.testing.assert_close(turned(x, first), expected)
    torch.testing.assert_close(turned(x.mT.contiguous().mT, first), expected)  # as a map's tokens lie in memory
