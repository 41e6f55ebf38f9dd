"""Reads what earlier launches of a run wrote, as rows for a tracker, one per step."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from dstune.protocols.tracker import Row


class History:
    """The rows that `metrics.jsonl` and `samples.jsonl` contain at this moment; rows that are appended later are ignored.

    The time of a row is now minus the seconds of all later steps and evaluations: when a run without interruptions would have
    written it.
    """

    def __init__(self, metrics: Path, samples: Path):
        self._metrics, self._metrics_size = metrics, metrics.stat().st_size
        self._samples = list(_lines(samples, samples.stat().st_size))
        self._now = time.time()
        self._seconds = sum(_seconds(row) for row in _lines(metrics, self._metrics_size))

    def rows(self) -> Iterator[Row]:
        """Yield one row per step, in the order of the steps."""
        answers = {
            step: tuple(answers_of_step)
            for step, answers_of_step in groupby(self._samples, key=lambda row: row["step"])
        }
        seconds_left = self._seconds
        answers_so_far: tuple[dict[str, Any], ...] = ()

        def row_of(step: int, metrics: dict[str, Any]) -> Row:
            nonlocal answers_so_far
            new = answers.pop(step, ())
            answers_so_far += new
            return Row(step, metrics, self._now - seconds_left, answers_so_far if new else ())

        for step, rows in groupby(_lines(self._metrics, self._metrics_size), key=lambda row: row["step"]):
            for earlier in sorted(other for other in answers if other < step):
                yield row_of(earlier, {})
            metrics: dict[str, Any] = {}
            for row in rows:
                seconds_left -= _seconds(row)
                metrics |= {name: value for name, value in row.items() if name != "step"}
            yield row_of(step, metrics)
        for step in sorted(answers):
            yield row_of(step, {})


def _lines(path: Path, size: int) -> Iterator[dict[str, Any]]:
    with path.open("rb") as stream:
        for line in stream:
            if stream.tell() > size:
                return
            yield json.loads(line)


def _seconds(row: dict[str, Any]) -> float:
    values = (row.get("step_seconds"), row.get("eval/seconds"))
    return sum(value for value in values if isinstance(value, int | float) and abs(value) < 2**53)
