"""What a trial reached, from the files of its run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dstune.config.schema import Export, RunConfig
from dstune.core.parsing import parse_json
from dstune.launch import records
from dstune.tracking import trials


class Metrics:
    """The rows of a run's metrics.jsonl as they come. A file that was written anew (a restart) is read from its begin."""

    def __init__(self, run_dir: Path):
        self._path = run_dir / "metrics.jsonl"
        self._at = 0
        self._rest = b""
        self._file: int | None = None

    def new(self) -> list[dict[str, Any]]:
        """Return the whole rows since the last call."""
        try:
            with self._path.open("rb") as stream:
                status = self._path.stat()
                if status.st_ino != self._file or status.st_size < self._at:
                    self._file, self._at, self._rest = status.st_ino, 0, b""
                stream.seek(self._at)
                data = stream.read()
        except OSError:
            return []
        self._at += len(data)
        whole, _, self._rest = (self._rest + data).rpartition(b"\n")
        rows = []
        for line in whole.split(b"\n"):
            try:
                row = parse_json(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
        return rows


def reached(run_dir: Path, config: RunConfig, objectives: Sequence[str]) -> dict[str, float]:
    """Return the value of each objective that the run has (see `trials.reached`)."""
    result = records.read_result(run_dir) or {}
    return trials.reached(result, Metrics(run_dir).new(), objectives, of_best=config.run.export is Export.best)
