"""Every combination of the values, in order, without those that are finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dstune.config.schema import RunConfig
from dstune.config.sweep_space import Axis, grid
from dstune.sweep.directory import status_in, trial_name, write_record
from dstune.sweep.outcome import reached
from dstune.sweep.schedule import Trial
from dstune.tracking.trials import FINISHED, Record, read_record, record_path


class Grid:
    """objectives: what is noted of a trial. again: start those that are finished too (their runs became longer)."""

    def __init__(self, sweep: Path, config: RunConfig, axes: Sequence[Axis], objectives: Sequence[str], *, again: bool):
        self._sweep, self._config, self._objectives = sweep, config, objectives
        self.trials = [
            Trial(trial_name(assignment), number, assignment.overrides, assignment.plain)
            for number, assignment in enumerate(grid(axes))
        ]
        self.finished = [] if again else [trial for trial in self.trials if self._is_finished(trial)]
        self._left = [trial for trial in self.trials if trial not in self.finished]

    def _is_finished(self, trial: Trial) -> bool:
        run_dir = self._sweep / trial.name
        status = status_in(run_dir)
        if status not in FINISHED:
            return False
        record = read_record(record_path(self._sweep, trial.name))
        noted = record is not None and record.status == status and bool(record.objective)
        if record is None or not noted:  # nobody waited for its end
            record = record or Record(trial.name, trial.number, dict(trial.values))
            self._note(record, status, reached(run_dir, self._config, self._objectives))
        elif record.number != trial.number:  # values were added in front of it
            self._note(record, status, record.objective, trial.number)
        return True

    def _note(self, record: Record, status: str, objective: dict[str, float], number: int | None = None) -> None:
        content = vars(record) | {"status": status, "objective": objective}
        write_record(self._sweep, Record(**(content | ({} if number is None else {"number": number}))))

    def next(self) -> Trial | None:
        return self._left.pop(0) if self._left else None

    @property
    def exhausted(self) -> bool:
        return not self._left

    def watch(self, trial: Trial, rows: Sequence[Mapping[str, Any]]) -> str:
        return ""

    def ended(self, trial: Trial, status: str, run_dir: Path) -> dict[str, float]:
        return reached(run_dir, self._config, self._objectives) if status in FINISHED else {}
