"""The figures of ``benchmarks.color`` as the tables of docs/color.md, each between its two marks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs" / "color.md"


def write_tables(figures: dict[str, Any], file: Path = DOCS) -> None:
    """Put every table there are figures for in its place; the rest of the file stays."""
    text = file.read_text(encoding="utf-8")
    tables = {"methods": _methods({name: row for name, row in figures.items() if "delta_e_after" in row})}
    if "video" in figures:
        tables["video"] = _video(figures["video"])
    if "guidance" in figures:
        tables["guidance"] = _guidance(figures["guidance"])
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(start)
        _, after = rest.split(end)
        text = f"{before}{start}{table}{end}{after}"
    file.write_text(text, encoding="utf-8")


def _methods(figures: dict[str, Any]) -> str:
    rows = sorted(figures.items(), key=lambda row: row[1]["delta_e_after"])
    return _table(
        ("method", "before", "after", "falls by", "colour", "curves", "light", "ms, 1024x1024", "round trips"),
        (
            (
                name,
                f"{found['delta_e_before']:.2f}",
                f"{found['delta_e_after']:.2f}",
                *(f"{found[key]:.1%}" for key in ("fall", "fall_colour", "fall_curves", "fall_light")),
                f"{found['milliseconds_1024']:.0f}",
                f"{found['milliseconds_1024'] / found['round_trip_milliseconds_1024']:.2f}",
            )
            for name, found in rows
        ),
    )


def _video(found: dict[str, float]) -> str:
    return _table(
        ("frames of 720p", "seconds", "the result, MiB", "beside it at most, MiB"),
        [
            (
                f"{found['frames']}",
                f"{found['seconds']:.0f}",
                f"{found['result_mib']:.0f}",
                f"{found['beside_the_result_mib']:.0f}",
            )
        ],
    )


def _guidance(figures: dict[str, Any]) -> str:
    """Means; for the change also half of its 95 % interval."""
    keys = ("shape_iou", "delta_e", "delta_e_of_mean_colour", "distribution_error")
    rows = []
    for name in ("injection", "injection + guidance", "change"):
        found = figures[name]
        halves = {key: (found[f"{key}_high"] - found[f"{key}_low"]) / 2 for key in keys}
        rows.append((name, *(f"{found[key]:.3f}" + f" ±{halves[key]:.3f}" * (name == "change") for key in keys)))
    head = ("shape IoU", "CIEDE2000", "CIEDE2000 of the mean colours", "distribution of the colours")
    return _table((f"{figures['pairs']} pairs", *head), rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
