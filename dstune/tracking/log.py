"""Reports a run to the run directory's files, the console and the trackers, through one `log(step, metrics)`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from dstune.config.schema import RunConfig
from dstune.core.secrets import redacted
from dstune.protocols import TRACKERS
from dstune.protocols.tracker import Row
from dstune.tracking.background import Background
from dstune.tracking.console import Console
from dstune.tracking.history import History
from dstune.tracking.jsonl import JsonLines, plain, rows_of

Metrics = Mapping[str, float | int | str]

SAMPLE_COLUMNS = ("prompt", "reference", "answer")

FINISH_SECONDS, PREEMPTED_SECONDS, CRASHED_SECONDS = 60.0, 10.0, 3.0
"""How long all trackers together may hold up the end of a run. A preempted one is about to be killed, and the launcher
ends the other ranks of a crashed one within launch.grace_seconds."""


class RunLog:
    """The log of a run on rank 0; other ranks have none.

    Writes `metrics.jsonl` and `samples.jsonl` in `run_dir`, and sends the same rows to the trackers that
    `tracking` turns on. resumed_at_step: the step of the checkpoint, up to which rows are kept; None for a run that
    starts at step 0, which drops everything that an earlier attempt wrote.

    A failing disk raises OSError, since a run that loses its metrics should not continue. On a full disk, rows wait for space.
    A failing tracker warns once.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, *, resumed_at_step: int | None, console: Console | None = None
    ):
        self._console = console or Console()
        self._leading = ("loss", config.trainer.early_stopping.metric)
        files = run_dir / "metrics.jsonl", run_dir / "samples.jsonl"
        self._metrics, self._samples = (JsonLines(file, keep_until=resumed_at_step) for file in files)
        # What an earlier launch wrote behind its last save, and this one comes to again: a killed run's last evaluations.
        rows_by_file = [[] if resumed_at_step is None else rows_of(file, resumed_at_step) for file in files]
        self._measured = {(row["step"], frozenset(row)) for row in rows_by_file[0]}
        self._answered = {(row["step"], row.get("prompt")) for row in rows_by_file[1]}
        self._row: Row | None = None
        """The newest step, which is not sent to the trackers yet: they get it once, with its evaluation and answers."""
        self._answers: tuple[Mapping[str, Any], ...] = ()
        self._newest = -1
        self._trackers: list[Background] = []
        fresh = resumed_at_step is None
        enabled = [room for room in TRACKERS.classes().values() if room.enabled(config.tracking)]
        if enabled:
            history = History(*files)
            for row in history.rows():
                self._row, self._answers = row, row.samples or self._answers
            held = self._row.step if self._row else 0

            def past() -> Iterator[Row]:
                return takewhile(lambda row: row.step < held, history.rows())

            self._trackers = [
                Background(room(config, run_dir, self.message, fresh=fresh), past, self.message) for room in enabled
            ]

    def log(self, step: int, metrics: Metrics, rows: int | None = None) -> None:
        """Log one row of metrics.jsonl. Rows named eval/NAME are shown on the console too. rows: number of measured rows."""
        if (step, frozenset(metrics) | {"step"}) not in self._measured:
            self._metrics.append({"step": step, **metrics})
        if self._trackers:
            self._collect(step, plain(metrics), answered=False)
        if any(name.startswith("eval/") for name in metrics):
            self._console.evaluation(step, metrics, self._leading, rows)

    def samples(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        """Log answers to held-out prompts, each with the keys prompt, reference and answer, into samples.jsonl."""
        new = [{"step": step, **{column: row.get(column, "") for column in SAMPLE_COLUMNS}} for row in rows]
        for row in new:
            if (step, row["prompt"]) not in self._answered:
                self._samples.append(row)
        if self._trackers and new:
            self._answers += tuple(new)
            self._collect(step, {}, answered=True)

    def rewind(self, step: int) -> None:
        """Go back to `step`. Files lose all later rows. Trackers, whose steps always increase, keep them, and get rows again from
        the first step that they do not have."""
        self._send()
        self._measured, self._answered = set(), set()
        for file in (self._metrics, self._samples):
            file.rewind(step)

    def progress(self, step: int, total_steps: int, metrics: Metrics) -> None:
        """Show on the console that `step` of `total_steps` is done."""
        self._console.progress(step, total_steps, metrics)

    def evaluating(self, step: int, done: int, total: int) -> None:
        """Show on the console that `done` of `total` micro-batches of an evaluation are done."""
        self._console.evaluating(step, done, total)

    def message(self, text: str) -> None:
        """Write a line to the console and logs/rank-0.log."""
        self._console.message(text)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write the run's result (the keys of result.json) for the trackers' summaries."""
        public_values = redacted(plain(values))
        for tracker in self._trackers:
            tracker.summary(public_values)

    def finish(self, status: str, *, crashed: bool = False) -> None:
        """Close everything; `status` is that of result.json. Calling it again does nothing.

        crashed: whether an exception ends this process, which must then end soon.
        """
        self._send(to_be_continued=status not in ("completed", "stopped", "pruned"))
        seconds = PREEMPTED_SECONDS if status == "preempted" else FINISH_SECONDS
        deadline = time.monotonic() + (CRASHED_SECONDS if crashed else seconds)
        for tracker in self._trackers:
            tracker.finish(status)
        for tracker in self._trackers:
            tracker.wait(deadline)
        self._trackers = []
        self._console.close()
        self._metrics.close()
        self._samples.close()

    def _collect(self, step: int, metrics: Mapping[str, Any], *, answered: bool) -> None:
        if step < self._newest:  # the trackers have this step from before the run went back
            return
        self._newest = step
        if self._row is None or self._row.step != step:
            self._send()
            self._row = Row(step, {}, 0.0)
        answers = self._answers if answered else self._row.samples
        self._row = replace(self._row, metrics={**self._row.metrics, **metrics}, time=time.time(), samples=answers)

    def _send(self, *, to_be_continued: bool = False) -> None:
        """Send the collected row to the trackers. to_be_continued: the next launch of the run may still evaluate at this step."""
        if self._row is not None:
            for tracker in self._trackers:
                tracker.write(self._row, only_if_rebuilt=to_be_continued)
            self._row = None
