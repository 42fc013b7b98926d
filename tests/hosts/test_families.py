"""The families of transformers as data, and the page that tells of them."""

from __future__ import annotations

import pytest

from inversion_core.hosts.families import FAMILIES, Family
from inversion_core.presets import PRESETS
from scripts import transformers_table


def test_the_page_says_what_the_code_does() -> None:
    text = transformers_table.PAGE.read_text(encoding="utf-8")
    assert text == transformers_table.page(text), "run scripts/transformers_table.py"


def test_the_table_refuses_what_the_preset_refuses() -> None:
    lines = [line.strip("| ").split(" | ") for line in transformers_table.table().splitlines()]
    assert lines[0][2:] == [family.name for family in FAMILIES.values()]
    told = {line[0].strip("`"): line[2:] for line in lines[2:-1]}
    assert told.keys() == PRESETS.keys()
    for name, cells in told.items():
        refused = all(step.blocks is None for step in PRESETS[name].steps)
        assert all((cell == transformers_table.REFUSED) == refused for cell in cells)
    assert {name for name, cells in told.items() if transformers_table.REFUSED in cells} == {"ctrl-x"}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_every_family_says_where_its_appearance_is(family: Family) -> None:
    assert family.rules("appearance, double.1") == f"{family.appearance}, double.1"
