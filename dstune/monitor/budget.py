"""One error budget for checks that are repeated: what each may spend, and the record of what was spent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstune.core import files
from dstune.core.parsing import parse_json, read_file

FOLDER = "monitor"
"""Below the run directory."""
CHECKS = "checks.jsonl"
LARGEST = 64 << 20
"""Bytes of the file of checks that are read at most."""
STREAM_SHARE = 0.2
"""Of a check's level, for the streams; the rest is for the tests of two samples."""


@dataclass(frozen=True)
class Budget:
    """At most `alpha` is the chance of a false alarm in `checks` checks; Bonferroni, since checks share the reference rows."""

    alpha: float
    checks: int
    number: int = 1
    """Of this check, from 1."""

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
        """Return a family's p-value, so that it can be compared with `alpha`."""
        return min(1.0, p * self.alpha / self.for_family(families, with_streams=with_streams))

    def to_json(self) -> dict[str, Any]:
        place = (self.number - 1) % self.checks + 1
        return {"alpha": self.alpha, "checks": self.checks, "check": place, "level": self.level}


def read_checks(folder: Path) -> list[dict[str, Any]]:
    """Return the record of each earlier check; a line that a killed process left unfinished is none."""
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
    """Return the number of the check that looked at the same rows in the same way: to look again costs nothing."""
    matching = (record for record in records if record.get("rows") == rows)
    return next((record["number"] for record in matching if isinstance(record.get("number"), int)), None)


def note_check(folder: Path, record: dict[str, Any]) -> None:
    """Append a record: digests and statistics, no text of a row."""
    folder.mkdir(parents=True, exist_ok=True)
    with files.append(folder / CHECKS) as stream:
        stream.write(json.dumps(record).encode() + b"\n")
