"""Sheets: sizes, colours in their order, and the mark where it was asked for."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from nodes.sheet import CAPTION, GAP, SIDE, Panel, heat, marked, overlaid, sheet, table


def test_a_sheet_holds_its_panels_uncropped() -> None:
    wide, high = torch.full((20, 40, 3), 1.0), torch.full((900, 300, 3), 1.0)
    drawn = sheet([[Panel("wide", wide), Panel("high", high)], [Panel("wide", wide)]])
    assert drawn.shape == (1, 2 * (CAPTION + SIDE + GAP) + GAP, 2 * (SIDE + GAP) + GAP, 3)
    top, second = GAP + CAPTION, GAP + SIDE + GAP
    first = drawn[0, top : top + SIDE, GAP : GAP + SIDE]
    assert int((first == 1).all(-1).sum()) == SIDE * SIDE // 2
    assert bool((first[SIDE // 4 : SIDE * 3 // 4] == 1).all())
    other = drawn[0, top : top + SIDE, second : second + SIDE]
    assert int((other == 1).all(-1).all(0).sum()) == round(SIDE / 3)


@settings(deadline=None)
@given(st.floats(-5, 5), st.floats(0.1, 5))
def test_heat_rises_from_dark_to_bright(low: float, span: float) -> None:
    drawn = heat(torch.linspace(low - 1, low + span + 1, 50)[None], low, low + span)
    assert float(drawn.min()) >= 0 and float(drawn.max()) <= 1
    # Rec. 709 luma.
    brightness = drawn[0] @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert bool((brightness.diff() >= -1e-5).all())
    assert float(brightness[-1] - brightness[0]) > 0.8


def test_heat_of_a_flat_map_is_a_colour() -> None:
    assert bool(heat(torch.ones(2, 2), 1, 1).isfinite().all())


def test_colours_lie_over_their_part_of_the_picture() -> None:
    colours = torch.tensor([[[1.0, 0, 0], [0, 0, 1.0]]])
    laid = overlaid(torch.rand(10, 20, 3), colours, 1.0)
    assert_close(laid[:, :10], colours[:, :1].expand(10, 10, 3))
    assert_close(laid[:, 10:], colours[:, 1:].expand(10, 10, 3))
    grey = overlaid(torch.tensor([0.9, 0.3, 0.0]).expand(10, 20, 3), colours, 0.0)
    assert_close(grey, torch.full((10, 20, 3), 0.4))


def test_a_cross_marks_the_place() -> None:
    drawn = marked(torch.zeros(100, 200, 3), 0.25, 0.5)
    where = (drawn == 1).all(-1).nonzero().float()
    assert_close(where.mean(0), torch.tensor([50.0, 50.0]), atol=1.0, rtol=0)


def test_a_table_has_a_line_for_each_row() -> None:
    one, three = (table("title", [("name", "1.0", "remark")] * n) for n in (1, 3))
    assert three.shape[2] == one.shape[2]
    assert three.shape[1] > one.shape[1]
    assert_close(three[:, : one.shape[1] - 30], one[:, : one.shape[1] - 30])
