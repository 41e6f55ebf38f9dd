"""What a trial reached, from the files of its run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dstune.config.schema import Export, RunConfig
from dstune.config.sweep_rules import COSTS
from dstune.launch import records
from dstune.trials import TRAINING_LOSS


class Metrics:
    """The rows of a run's metrics.jsonl as they come. A file that was written anew (a restart) is read from its begin."""

    def __init__(self, run_dir: Path):
        self._path = run_dir / "metrics.jsonl"
        self._at = 0
        self._rest = b""
        self._file: int | None = None

    def new(self) -> list[dict[str, Any]]:
        """The whole rows since the last call."""
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
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
        return rows


def reached(run_dir: Path, config: RunConfig, objectives: Sequence[str]) -> dict[str, float]:
    """The value of each objective that the run has: of the last evaluation, or of the best one where that is exported."""
    result = records.read_result(run_dir) or {}
    rows = Metrics(run_dir).new()
    evaluated: dict[str, Any] = dict(result.get("eval_final") or {})
    best = result.get("best")
    if config.run.export is Export.best and isinstance(best, dict):
        at_best = [row for row in rows if row["step"] == best.get("step") and f"eval/{best.get('metric')}" in row]
        if at_best:
            evaluated = {name.removeprefix("eval/"): value for name, value in at_best[-1].items()}
    found = {}
    for name in objectives:
        if name == TRAINING_LOSS:
            value = _training_loss(rows)
        else:
            value = result.get(name) if name in COSTS else evaluated.get(name)
        if isinstance(value, (int, float)) and math.isfinite(value):
            found[name] = float(value)
    return found


def _training_loss(rows: Sequence[dict[str, Any]]) -> float | None:
    losses = [row["loss"] for row in rows if isinstance(row.get("loss"), (int, float))]
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last) if last else None
