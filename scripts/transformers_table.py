"""Writes into docs/dit.md which preset reads the appearance where in which family of models, from the code itself.

.venv/bin/python scripts/transformers_table.py
"""

# ruff: noqa: E402
from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo.files import replace_file
from inversion_core.hosts.families import FAMILIES, Family
from inversion_core.presets import PRESETS, Preset, Step

PAGE = ROOT / "docs" / "dit.md"
START, END = "<!-- families -->", "<!-- /families -->"
REFUSED = "refused"


def table() -> str:
    """Presets down, UNets and the families across."""
    families = list(FAMILIES.values())
    head = ["preset", "UNets", *(family.name for family in families)]
    rows = [[f"`{name}`", _on_unets(one), *(_on(one, family) for family in families)] for name, one in PRESETS.items()]
    rows.append(["*positions*", "-", *("-" if family.rotary is None else "own, shared" for family in families)])
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(text: str) -> str:
    """The page with the table of today."""
    before, rest = text.split(START)
    return f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}"


def _on_unets(preset: Preset) -> str:
    return _sites(step.sites for step in preset.steps)


def _on(preset: Preset, family: Family) -> str:
    steps: list[Step] = [step for step in preset.steps if step.blocks is not None]
    return _sites(family.rules(step.blocks or "") for step in steps) or REFUSED


def _sites(rules: Iterable[str]) -> str:
    return "; ".join(f"`{one}`" for one in dict.fromkeys(rules))


if __name__ == "__main__":
    replace_file(PAGE, lambda path: path.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8"))
    print(PAGE)
