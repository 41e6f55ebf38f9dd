"""How a step's time divides: waiting for rows, forward passes, backward passes, and the update."""

from __future__ import annotations

import time
from typing import Any

import torch

PARTS = ("forward", "backward", "update")
"""In this order within a step; forward and backward once for each micro-batch. At ZeRO 2 and 3 gradients are reduced inside the
backward pass, and at ZeRO 3 weights are gathered inside both."""


class TimeSplit:
    """Marks the ends of the parts of a step. On a GPU the stream's events are timed, which nobody waits for."""

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_available()
        self._marks: list[tuple[str, Any]] = []
        self._waited = 0.0

    def begin(self, waited: float) -> None:
        """A step begins, which waited so long for its rows."""
        self._waited = waited
        self._marks = [("", self._moment())]

    def mark(self, part: str) -> None:
        """One of `PARTS` ends here."""
        self._marks.append((part, self._moment()))

    def seconds(self) -> dict[str, float]:
        """Of the step that is over, as metrics. What comes before the first forward pass counts as part of it."""
        found = {"data_seconds": self._waited} | {f"{part}_seconds": 0.0 for part in PARTS}
        if self._on_gpu and self._marks:
            self._marks[-1][1].synchronize()
        for (_, began), (part, ended) in zip(self._marks, self._marks[1:], strict=False):
            taken = began.elapsed_time(ended) / 1e3 if self._on_gpu else ended - began
            found[f"{part}_seconds"] += taken
        return found

    def _moment(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
