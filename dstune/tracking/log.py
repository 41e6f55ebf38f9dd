"""One `log(step, metrics)` in front of the run directory's files, the console and W&B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dstune.config.schema import RunConfig, WandbMode
from dstune.tracking.console import Console
from dstune.tracking.jsonl import JsonLines
from dstune.tracking.wandb_sink import WandbSink

Metrics = Mapping[str, float | int | str]

SAMPLE_COLUMNS = ("prompt", "reference", "answer")


class Tracker:
    """What rank 0 reports of a run; the other ranks have none.

    Writes `metrics.jsonl` and `samples.jsonl` in `run_dir`, and sends the same rows to W&B unless
    `tracking.wandb.mode=disabled`. resumed_at_step: the checkpoint's step, whose rows and earlier ones stay; None for a
    run that starts at step 0, where whatever an earlier attempt wrote is dropped.

    A failing disk raises OSError: a run whose metrics are lost is not worth going on with. A failing W&B warns once.
    """

    def __init__(self, config: RunConfig, run_dir: Path, *, resumed_at_step: int | None):
        self._console = Console()
        self._metrics = JsonLines(run_dir / "metrics.jsonl", keep_until=resumed_at_step)
        self._samples = JsonLines(run_dir / "samples.jsonl", keep_until=resumed_at_step)
        enabled = config.tracking.wandb.mode is not WandbMode.disabled
        self._wandb = WandbSink(config, run_dir, self.message) if enabled else None

    def log(self, step: int, metrics: Metrics) -> None:
        """One row of metrics.jsonl. Rows named eval/NAME are shown on the console too."""
        self._metrics.append({"step": step, **metrics})
        if self._wandb:
            self._wandb.log(step, metrics)
        if any(name.startswith("eval/") for name in metrics):
            self._console.evaluation(step, metrics)

    def samples(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        """Answers to held-out prompts, each with the keys prompt, reference and answer, into samples.jsonl."""
        for row in rows:
            self._samples.append({"step": step, **{column: row.get(column, "") for column in SAMPLE_COLUMNS}})
        if self._wandb and rows:
            self._wandb.samples(step, rows, SAMPLE_COLUMNS)

    def progress(self, step: int, total_steps: int, metrics: Metrics) -> None:
        """Show on the console that `step` of `total_steps` is done."""
        self._console.progress(step, total_steps, metrics)

    def message(self, text: str) -> None:
        """A line for the reader of the console and of logs/rank-0.log."""
        self._console.message(text)

    def summary(self, values: Mapping[str, Any]) -> None:
        """The run's result (the keys of result.json) into W&B's summary."""
        if self._wandb:
            self._wandb.summary(values)

    def finish(self, status: str) -> None:
        """Close everything; `status` is that of result.json. Calling it again does nothing."""
        self._console.close()
        if self._wandb:
            self._wandb.finish(status)
        self._metrics.close()
        self._samples.close()
