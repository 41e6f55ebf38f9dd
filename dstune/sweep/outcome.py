"""Reads the metrics and objective values of a trial from the files of its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dstune.config.schema import Export, RunConfig
from dstune.core.parsing import parse_json
from dstune.launch import records
from dstune.tracking import trials


class Metrics:
    """Follows a run's metrics.jsonl while it grows. If a restart replaces the file, reading begins at its start again."""

    def __init__(self, run_dir: Path):
        self._path = run_dir / "metrics.jsonl"
        self._offset = 0
        self._partial_line = b""
        self._inode: int | None = None

    def new(self) -> list[dict[str, Any]]:
        """Return the complete rows that were added since the last call."""
        try:
            with self._path.open("rb") as stream:
                status = self._path.stat()
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset, self._partial_line = status.st_ino, 0, b""
                stream.seek(self._offset)
                data = stream.read()
        except OSError:
            return []
        self._offset += len(data)
        complete_lines, _, self._partial_line = (self._partial_line + data).rpartition(b"\n")
        rows = []
        for line in complete_lines.split(b"\n"):
            try:
                row = parse_json(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
        return rows


def ended_unwatched(record: trials.Record, status: str, run_dir: Path, objective: Mapping[str, float]) -> trials.Record:
    """Return the record of a trial that ended while no sweep watched it."""
    return trials.ended_unwatched(record, status, records.read_result(run_dir) or {}, objective)


def reached(run_dir: Path, config: RunConfig, objectives: Sequence[str]) -> dict[str, float]:
    """Return the value that the run reached in each objective, without those that it has no value of (see `trials.reached`)."""
    result = records.read_result(run_dir) or {}
    return trials.reached(result, Metrics(run_dir).new(), objectives, of_best=config.run.export is Export.best)
