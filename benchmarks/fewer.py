"""The option ``--fewer``: dear methods for the first tasks only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def fewest(asked: Sequence[str], meant: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """By method, how many tasks it is for at most.

    Args:
        asked: each ``NAME=COUNT``; later ones count.
        meant: by name that may be asked for, the methods it stands for.

    Raises:
        SystemExit: a name that is not known, or a count below 1.
    """
    found: dict[str, int] = {}
    for one in asked:
        name, _, count = one.rpartition("=")
        if name not in meant or not count.isdigit() or int(count) < 1:
            raise SystemExit(f"--fewer: {one!r} is no NAME=COUNT with one of {', '.join(meant)}")
        found |= dict.fromkeys(meant[name], int(count))
    return found
