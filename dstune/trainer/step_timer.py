"""Measures the time of a step and of its parts: waiting for rows, forward passes, backward passes, and the update."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from dstune.zero import accelerator

PARTS = ("forward", "backward", "update")
"""In this order within a step; forward and backward once for each micro-batch. At ZeRO 2 and 3 gradients are reduced inside the
backward pass, and at ZeRO 3 weights are gathered inside both."""
METRICS = ("data_seconds", *(f"{part}_seconds" for part in PARTS))


@dataclass(frozen=True)
class StepTimes:
    """The times of a step's parts. On a GPU the device may not have finished the step yet."""

    waited: float
    marks: list[tuple[str, Any]]
    on_gpu: bool

    @property
    def are_known(self) -> bool:
        """Whether they can be read without waiting for the device."""
        return not self.on_gpu or not self.marks or bool(self.marks[-1][1].query())

    def parts(self) -> dict[str, float]:
        """Return the seconds of the parts as metrics. Time before the first forward pass counts as part of it."""
        seconds_by_part = dict.fromkeys(METRICS, 0.0) | {"data_seconds": self.waited}
        if not self.are_known:
            self.marks[-1][1].synchronize()
        for (_, began), (part, ended) in zip(self.marks, self.marks[1:], strict=False):
            seconds = began.elapsed_time(ended) / 1e3 if self.on_gpu else ended - began
            seconds_by_part[f"{part}_seconds"] = seconds_by_part.get(f"{part}_seconds", 0.0) + seconds
        return seconds_by_part


class StepTimer:
    """Marks the ends of a step's parts; on a GPU by events in the stream, which the host does not wait for."""

    def __init__(self) -> None:
        self._on_gpu = accelerator.present()
        self._marks: list[tuple[str, Any]] = []
        self._started = time.perf_counter()
        self._waited = 0.0

    def start(self) -> None:
        """Start the step's time, with waiting for its rows."""
        self._started = time.perf_counter()

    def rows_ready(self) -> float:
        """Note that the rows are loaded; return the seconds waited for them."""
        self._waited = time.perf_counter() - self._started
        return self._waited

    def begin(self) -> None:
        """Note that the first forward pass comes next."""
        self._marks = [("", self._moment())]

    def mark(self, part: str) -> None:
        """Mark the end of a part: one of `PARTS`, or a further one of a task (`rollout`)."""
        self._marks.append((part, self._moment()))

    def seconds(self) -> float:
        """Return the seconds since `start`."""
        return time.perf_counter() - self._started

    def times(self) -> StepTimes:
        """Return the times of the finished step."""
        return StepTimes(self._waited, self._marks, self._on_gpu)

    def _moment(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        return accelerator.moment()
