"""Submits a sweep to a queue as one array (`launch=slurm launch.wait=false`), and does not wait for it.

Every unfinished trial is a job of the array; the queue runs at most `sweep.parallel` of them at a time. All combinations and the
size of a job have to be known before, so Optuna and axes over `launch.processes` are refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstune.config.flags import Flags
from dstune.config.overrides import quoted
from dstune.config.schema import RunConfig
from dstune.config.sweep_space import Axis
from dstune.core.errors import Problem, UserError
from dstune.launch import records
from dstune.launch.console import Console
from dstune.launch.queues import UnfinishedJobs, submitter_of
from dstune.launch.rundir import Prepared
from dstune.launch.train import Command, prepare
from dstune.protocols import launcher_of
from dstune.sweep.directory import Sweep, write_record
from dstune.sweep.grid import Grid
from dstune.sweep.schedule import Trial
from dstune.tracking.trials import Record, read_record, record_path


def is_array(config: RunConfig) -> bool:
    """Return whether the trials are left to a queue."""
    return submitter_of(config.launch) is not None


def problems(config: RunConfig, axes: Sequence[Axis]) -> Iterator[Problem]:
    """Yield why this sweep cannot be left to the queue."""
    if submitter := submitter_of(config.launch):
        if config.sweep.optuna:
            reason = "Optuna chooses the values of a trial after others have ended, so the sweep has to wait for them"
            yield Problem("launch.wait", reason, "launch.wait=true", "false")
        if any(axis.key == "launch.processes" for axis in axes):
            reason = "the jobs of an array have one size"
            yield Problem("launch.processes", reason, "launch.wait=true, or one value", "")
        yield from submitter.array_problems()


def submit(sweep: Sweep, grid: Grid, common: Sequence[str], console: Console) -> list[Trial]:
    """Write the run directories of the trials, submit them as one array, and return the submitted trials.

    Trials whose configuration is refused are recorded as failed and left out; trials that are in the queue already are skipped.

    Raises:
        UserError: the queue refuses the array.
    """
    submitter, queue = submitter_of(sweep.base.launch), launcher_of(sweep.base.launch).queue
    assert submitter is not None
    assert queue is not None
    queue.require()
    ready: list[tuple[Trial, Prepared]] = []
    trials = list(iter(grid.next, None))
    launch_records = {trial.name: records.read_launch(sweep.path / trial.name) for trial in trials}
    unfinished_jobs = UnfinishedJobs(filter(None, launch_records.values()))
    for trial in trials:
        jobs_in_queue, unreachable = unfinished_jobs.of(launch_records[trial.name])
        if unreachable:
            reason = f"{trial.name} may be in the queue already: {unreachable}"
            raise UserError(Problem("launch", reason, "run this command on a login node", sweep.base.launch.name))
        if jobs_in_queue:
            console.stage(f"{trial.name} is in the queue already")
            continue
        try:
            ready.append((trial, _prepare_trial(sweep, trial, common, console)))
        except UserError as error:
            _record(sweep.path, trial, status="failed", reason=str(error), starts=1)
            console.stage(f"{trial.name} failed: {error}")
    if not ready:
        return []
    with _releasing_locks(ready):
        runs = [(prepared.config, prepared.run_dir) for _, prepared in ready]
        try:
            jobs = submitter.submit_array(sweep.base, sweep.path, runs, console)
        except UserError:
            for _, prepared in ready:
                prepared.before.restore()
            raise
        for job, (trial, _) in zip(jobs, ready, strict=True):
            record_before = read_record(record_path(sweep.path, trial.name))
            _record(
                sweep.path,
                trial,
                place=f"{queue.name} job {job}",
                starts=(record_before.starts if record_before else 0) + 1,
            )
    return [trial for trial, _ in ready]


def _prepare_trial(sweep: Sweep, trial: Trial, common: Sequence[str], console: Console) -> Prepared:
    """Write the run directory of a trial. Raises UserError."""
    trial_overrides = [f"run.dir={quoted(str(sweep.path / trial.name))}", f"run.name={quoted(trial.name)}"]
    overrides = [word for word in common if "=" in word and not word.startswith("--")]
    flags = Flags(overrides=[*overrides, *trial.overrides, *trial_overrides], config_dirs=sweep.config_dirs)
    return prepare(Command(None, flags, json=False), console)


def _record(sweep: Path, trial: Trial, **changes: Any) -> None:
    """Write the record of a trial as one that runs, with these changes."""
    record_before = read_record(record_path(sweep, trial.name)) or Record(trial.name, trial.number, dict(trial.values))
    started: dict[str, Any] = {"status": "running", "reason": "", "objective": {}}
    write_record(sweep, replace(record_before, **(started | changes)))


@contextmanager
def _releasing_locks(ready: Sequence[tuple[Trial, Prepared]]) -> Iterator[None]:
    """Release the locks of the run directories at the end: the jobs take their own."""
    try:
        yield
    finally:
        for _, prepared in ready:
            if prepared.lock is not None:
                os.close(prepared.lock)
