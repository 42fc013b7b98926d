"""The figures of ``benchmarks.inversion`` as the tables of docs/inversion.md, each between its two marks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLUMNS = {
    "shape": (
        "concepts",
        "shape_present",
        "prompt_obeyed",
        "colour",
        "texture",
        "background",
        "seconds_per_step",
        "steps",
    ),
    "appearance": (
        "concepts",
        "appearance",
        "shape_obeyed",
        "colour",
        "texture",
        "background",
        "seconds_per_step",
        "steps",
    ),
    "both": ("concepts", "appearance", "shape_obeyed", "colour", "texture", "background"),
    "joint": (
        "concepts",
        "shape_present",
        "prompt_obeyed",
        "appearance",
        "shape_obeyed",
        "both_appearance",
        "both_shape_obeyed",
    ),
}
WHOLE = ("concepts", "steps")


def tables(figures: dict[str, Any]) -> dict[str, str]:
    """Kind -> Markdown."""
    return {kind: table_of(kind, figures[kind]) for kind in COLUMNS if kind in figures}


def write_tables(figures: dict[str, Any], page: Path) -> None:
    """Put every table there are figures for in its place; the rest of the page stays."""
    for kind, table in tables(figures).items():
        write_table(kind, table, page)


def write_table(name: str, table: str, page: Path) -> None:
    """Put one table between its two marks."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = page.read_text(encoding="utf-8").split(start)
    _, after = rest.split(end)
    page.write_text(f"{before}{start}{table}\n{end}{after}", encoding="utf-8")


def table_of(kind: str, methods: dict[str, dict[str, float]]) -> str:
    """Markdown: a row for each method."""
    head = [kind, *COLUMNS[kind]]
    body = [
        [name, *(f"{row[key]:.0f}" if key in WHOLE else f"{row[key]:.2f}" for key in COLUMNS[kind])]
        for name, row in methods.items()
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))
