"""Shares of flagged rows with intervals, by family, package, language and length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LENGTHS = (
    (100, "up to 100"),
    (400, "101 to 400"),
    (1600, "401 to 1,600"),
    (6000, "1,601 to 6,000"),
    (math.inf, "above 6,000"),
)
"""Lengths in characters."""


def wilson(flagged: int, rows: int) -> tuple[float, float]:
    """Return the 95% interval of a share (Wilson 1927). It lies within [0, 1] for any count, and is not empty even at 0% or
    100%."""
    if rows == 0:
        return 0.0, 1.0
    share, z = flagged / rows, 1.959964
    square = z * z
    centre = (share + square / (2 * rows)) / (1 + square / rows)
    half = z / (1 + square / rows) * math.sqrt(share * (1 - share) / rows + square / (4 * rows * rows))
    low, high = centre - half, centre + half
    return (0.0 if flagged == 0 else max(low, 0.0)), (1.0 if flagged == rows else min(high, 1.0))


@dataclass(frozen=True)
class Judged:
    """A row of a suite, and whether it was flagged."""

    row: Mapping[str, Any]
    flagged: bool
    level: str | None = None
    """The most certain level that it reached; None if the target states none."""


def cell(judged: Iterable[Judged]) -> dict[str, Any]:
    rows = list(judged)
    flagged = sum(row.flagged for row in rows)
    low, high = wilson(flagged, len(rows))
    return {
        "flagged": flagged,
        "rows": len(rows),
        "rate": round(flagged / len(rows), 4) if rows else None,
        "low": round(low, 4),
        "high": round(high, 4),
    }


def length_of(row: Mapping[str, Any]) -> str:
    return next(name for most, name in LENGTHS if len(row["text"]) <= most)


KEYS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "package": lambda row: str(row.get("package", "")),
    "family": lambda row: str(row.get("family", "")),
    "language": lambda row: str(row.get("language", "")),
    "characters": length_of,
}


def breakdown(judged: list[Judged]) -> dict[str, Any]:
    """Return the cell of all rows, then those by each key."""
    cells: dict[str, Any] = {"all": cell(judged)}
    for key, value_of in KEYS.items():
        groups: dict[str, list[Judged]] = {}
        for row in judged:
            groups.setdefault(value_of(row.row), []).append(row)
        order = [name for _, name in LENGTHS if name in groups] if key == "characters" else sorted(groups)
        cells[f"by_{key}"] = {name: cell(groups[name]) for name in order}
    return cells


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def line(name: str, cell: Mapping[str, Any]) -> str:
    """Return a line of a table: name, share, interval, count."""
    return (
        f"  {name:<46} {percent(cell['rate']):>7}  {percent(cell['low']):>6} to {percent(cell['high']):>6}  "
        f"{cell['flagged']}/{cell['rows']}"
    )
