"""`sweep=grid`: every combination of the values, in order, except those that are finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstune.config.schema import RunConfig
from dstune.config.sweep_space import Axis, grid
from dstune.sweep.directory import status_in, trial_name, write_record
from dstune.sweep.outcome import ended_unwatched, reached
from dstune.sweep.schedule import Trial
from dstune.tracking.trials import FINISHED, Record, read_record, record_path


class Grid:
    """The trials of a sweep, as a grid (see `schedule.Source`).

    objectives: metrics that are recorded for a trial. repeat_finished: whether finished trials run again, since runs became longer.
    """

    def __init__(
        self, sweep: Path, config: RunConfig, axes: Sequence[Axis], objectives: Sequence[str], *, repeat_finished: bool
    ):
        self._sweep, self._config, self._objectives = sweep, config, objectives
        self.trials = [
            Trial(trial_name(assignment), number, assignment.overrides, assignment.plain)
            for number, assignment in enumerate(grid(axes))
        ]
        self.finished = [] if repeat_finished else [trial for trial in self.trials if self._settle(trial)]
        self._waiting = [trial for trial in self.trials if trial not in self.finished]

    def _settle(self, trial: Trial) -> bool:
        """Return whether the trial is finished; if so, bring its record up to date."""
        run_dir = self._sweep / trial.name
        status = status_in(run_dir)
        if status not in FINISHED:
            return False
        record = read_record(record_path(self._sweep, trial.name))
        if record is None or record.status != status or not record.objective:  # it ended while no sweep watched it
            record = record or Record(trial.name, trial.number, dict(trial.values))
            objective = reached(run_dir, self._config, self._objectives)
            write_record(self._sweep, ended_unwatched(record, status, run_dir, objective))
        elif record.number != trial.number:  # values were added in front of it
            write_record(self._sweep, replace(record, number=trial.number))
        return True

    def next(self) -> Trial | None:
        return self._waiting.pop(0) if self._waiting else None

    @property
    def exhausted(self) -> bool:
        return not self._waiting

    def watch(self, trial: Trial, rows: Sequence[Mapping[str, Any]]) -> str:
        return ""

    def ended(self, trial: Trial, status: str, run_dir: Path) -> dict[str, float]:
        return reached(run_dir, self._config, self._objectives) if status in FINISHED else {}
