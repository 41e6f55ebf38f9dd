"""One error budget for repeated checks: the level of each check, and the record of earlier ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstune.core import files
from dstune.core.parsing import parse_json, read_file

FOLDER = "monitor"
"""The folder inside the run directory."""
CHECKS = "checks.jsonl"
LARGEST = 64 << 20
"""The most bytes that are read of the file of checks."""
STREAM_SHARE = 0.2
"""Share of a check's level for the streams; the rest is for the two-sample tests."""


@dataclass(frozen=True)
class Budget:
    """Bounds the chance of a false alarm in `checks` checks by `alpha`, by Bonferroni, since checks share the reference rows."""

    alpha: float
    checks: int
    number: int = 1
    """The number of this check, from 1."""

    @property
    def level(self) -> float:
        """The level of one check."""
        return self.alpha / self.checks

    def for_family(self, families: int, *, with_streams: bool) -> float:
        """Return the level of each family of signals."""
        return self.level * (1 - STREAM_SHARE if with_streams else 1) / families

    def for_stream(self, streams: int) -> float:
        return self.level * STREAM_SHARE / streams

    def corrected(self, p: float, families: int, *, with_streams: bool) -> float:
        """Return a family's corrected p-value, to be compared with `alpha`."""
        return min(1.0, p * self.alpha / self.for_family(families, with_streams=with_streams))

    def to_json(self) -> dict[str, Any]:
        place = (self.number - 1) % self.checks + 1
        return {"alpha": self.alpha, "checks": self.checks, "check": place, "level": self.level}


def read_checks(folder: Path) -> list[dict[str, Any]]:
    """Return the records of earlier checks; a line that a killed process left incomplete is skipped."""
    try:
        lines = read_file(folder / CHECKS, LARGEST).splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def earlier_check(records: list[dict[str, Any]], rows: str) -> int | None:
    """Return the number of an earlier check of the same rows with the same settings: repeating it costs nothing."""
    matching = (record for record in records if record.get("rows") == rows)
    return next((record["number"] for record in matching if isinstance(record.get("number"), int)), None)


def note_check(folder: Path, record: dict[str, Any]) -> None:
    """Append a record: digests and statistics, but no text of a row."""
    folder.mkdir(parents=True, exist_ok=True)
    with files.append(folder / CHECKS) as stream:
        stream.write(json.dumps(record).encode() + b"\n")
