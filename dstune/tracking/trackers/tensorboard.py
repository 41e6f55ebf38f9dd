"""TensorBoard: event files in the run directory. Every launch writes all of them again from `metrics.jsonl`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from dstune.config.convert import to_dict, to_yaml
from dstune.core.errors import Problem
from dstune.protocols import Tracker, tracker
from dstune.protocols.tracker import Row, TrackingConfig
from dstune.tracking.flat import flat, indented, numbers

FLUSH_SECONDS = 10
COMPARED = ("loss", "eval/loss")
"""Metrics in TensorBoard's hyperparameter table, which compares runs."""


@tracker
class TensorBoard(Tracker):
    """Writes scalars under their names in `metrics.jsonl`, answers as text, and the configuration as text and hyperparameters."""

    name = "tensorboard"
    switch = "Write TensorBoard's event files into the run directory (needs `pip install '.[tensorboard]'` in a clone)."
    title = "TensorBoard"
    rebuilds = True

    @classmethod
    def missing(cls, tracking: TrackingConfig) -> Iterator[Problem]:
        if find_spec("tensorboard") is None:
            fix = "pip install '.[tensorboard]' in a clone of dstune"
            yield Problem("tracking.tensorboard", "the package tensorboard is not installed", fix, "true")

    def start(self, past: Iterator[Row]) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = self._run_dir / "tensorboard"
        old_files = list(folder.glob("events.out.tfevents.*"))
        # A TensorBoard that displays the run drops what it has read, from `purge_step` on.
        self._writer = SummaryWriter(str(folder), purge_step=0 if old_files else None, flush_secs=FLUSH_SECONDS)
        settings = {key: value for key, value in flat(to_dict(self._config)).items() if value is not None}
        for part in hparams(settings, dict.fromkeys(COMPARED, 0.0)):
            self._writer._get_file_writer().add_summary(part)
        self._writer.add_text("configuration", indented(to_yaml(self._config)))
        for row in past:
            self.write(row)
        self._writer.flush()
        for file in old_files:
            # This launch empties the file and the next one removes it: a TensorBoard that displays the run gets stuck at a file
            # that disappears.
            if file.stat().st_size:
                os.truncate(file, 0)
            else:
                file.unlink()

    def location(self) -> str:
        return f"tensorboard --logdir {self._run_dir / 'tensorboard'}"

    def write(self, row: Row) -> None:
        for name, value in numbers(row.metrics).items():
            self._writer.add_scalar(name, value, row.step, walltime=row.time)
        new_answers = [answer for answer in row.samples if answer["step"] == row.step]
        for number, answer in enumerate(new_answers):
            text = "\n\n".join(f"**{name}**\n\n{indented(str(answer[name]))}" for name in answer if name != "step")
            self._writer.add_text(f"samples/{number}", text, row.step, walltime=row.time)

    def summary(self, values: Mapping[str, Any]) -> None:
        lines = "\n".join(f"{name}: {value}" for name, value in flat(values).items())
        self._writer.add_text("result", indented(lines), values.get("steps"))

    def finish(self, status: str) -> None:
        self._writer.close()
