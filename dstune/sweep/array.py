"""A sweep as one array of SLURM jobs (`launch=slurm launch.wait=false`): a task for each trial that is left, at most
`sweep.parallel` of them at a time, and nobody who waits.

Every trial has its own job script, as any run has (`slurm_script`); a task of the array runs one of them. What an array
needs is known before: every combination, and jobs of one size.
"""

from __future__ import annotations

import os
import shlex
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from dstune.config.flags import Flags
from dstune.config.launch_schema import SlurmConfig
from dstune.config.overrides import quoted
from dstune.config.schema import RunConfig
from dstune.config.sweep_schema import OptunaConfig
from dstune.config.sweep_space import Axis
from dstune.errors import Problem, UserError
from dstune.launch import records, slurm_jobs
from dstune.launch.commands import inherited
from dstune.launch.console import Console
from dstune.launch.rundir import Prepared
from dstune.launch.slurm_script import SCRIPT, job_script, options, ranks_per_node
from dstune.launch.train import Command, prepare
from dstune.sweep.directory import Sweep, write_record
from dstune.sweep.grid import Grid
from dstune.sweep.schedule import Trial
from dstune.trials import Record, read_record, record_path

ARRAY = Path("launch") / "array.sbatch"


def is_array(config: RunConfig) -> bool:
    return isinstance(config.launch, SlurmConfig) and not config.launch.wait


def problems(config: RunConfig, axes: Sequence[Axis]) -> Iterator[Problem]:
    """Why this sweep cannot be left to SLURM."""
    if isinstance(config.launch, SlurmConfig) and not config.launch.wait:
        if isinstance(config.sweep, OptunaConfig):
            reason = "Optuna chooses the values of a trial after others have ended, so the sweep has to wait for them"
            yield Problem("launch.wait", reason, "launch.wait=true", "false")
        if any(axis.key == "launch.processes" for axis in axes):
            reason = "the jobs of an array have one size"
            yield Problem("launch.processes", reason, "launch.wait=true, or one value", "")
        if config.launch.chain > 1:
            reason = "the jobs of an array do not wait for each other"
            yield Problem("launch.chain", reason, "launch.chain=1, or launch.wait=true", str(config.launch.chain))


def submit(sweep: Sweep, grid: Grid, common: Sequence[str], console: Console) -> list[Trial]:
    """Write the trials' run directories and submit the array; the trials in it.

    Raises:
        UserError: sbatch refuses. Trials that are refused are recorded as failed, and left out.
    """
    launch = sweep.base.launch
    assert isinstance(launch, SlurmConfig)
    slurm_jobs.require("sbatch")
    size = launch.nodes * ranks_per_node(launch)
    ready: list[tuple[Trial, Prepared]] = []
    while (trial := grid.next()) is not None:
        run_dir = sweep.path / trial.name
        if (record := records.read_launch(run_dir)) is not None and record.jobs and slurm_jobs.alive(record.jobs):
            console.stage(f"{trial.name} is in the queue already")
            continue
        try:
            ready.append((trial, _prepared(sweep, trial, common, console)))
        except UserError as error:
            _record(sweep.path, trial, status="failed", reason=str(error), starts=1)
            console.stage(f"{trial.name} failed: {error}")
    if not ready:
        return []
    launch_id = uuid.uuid4().hex
    with _released(ready):
        for _, prepared in ready:
            script = prepared.run_dir / SCRIPT
            script.parent.mkdir(exist_ok=True)
            script.write_text(job_script(prepared.config, prepared.run_dir, os.environ))
            script.chmod(0o755)
            records.begin(prepared.run_dir, launch_id, size)
        paths = [prepared.run_dir for _, prepared in ready]
        file = sweep.path / ARRAY
        for folder in (file.parent, sweep.path / "logs"):
            folder.mkdir(exist_ok=True)
        file.write_text(array_script(sweep.base, sweep.path, paths, os.environ))
        file.chmod(0o755)
        try:
            job = slurm_jobs.submit(file, {**os.environ, **inherited(sweep.base, os.environ)})
        except UserError:
            for _, prepared in ready:
                prepared.before.restore()
            raise
        for task, (trial, prepared) in enumerate(ready):
            records.note(prepared.run_dir, launch_id, size, [f"{job}_{task}"])
            before = read_record(record_path(sweep.path, trial.name))
            _record(sweep.path, trial, place=f"SLURM job {job}_{task}", starts=(before.starts if before else 0) + 1)
    console.stage(f"submitted array {job}: {len(ready)} jobs, {sweep.base.sweep.parallel} at a time, {file}")
    return [trial for trial, _ in ready]


def array_script(base: RunConfig, sweep: Path, runs: Sequence[Path], env: os._Environ[str] | dict[str, str]) -> str:
    """The script of the array: its tasks run the scripts of the trials in `runs`."""
    whole = sweep.absolute()
    log = str(whole / "logs" / "slurm-%A_%a.log")
    own = [
        *(
            option
            for option in options(base, whole, sorted(inherited(base, env)))
            if not option.startswith("--output=")
        ),
        f"--output={shlex.quote(log)}",
        f"--array=0-{len(runs) - 1}%{base.sweep.parallel}",
    ]
    lines = [
        "#!/usr/bin/env bash",
        f"# {base.run.name}: made by `dstune train --multirun launch=slurm launch.wait=false`, and made anew by each start.",
        *(f"#SBATCH {option}" for option in own),
        "",
        "runs=(",
        *(f"  {shlex.quote(str(run.absolute()))}" for run in runs),
        ")",
        f'exec bash "${{runs[$SLURM_ARRAY_TASK_ID]}}/{SCRIPT}"',
        "",
    ]
    return "\n".join(lines)


def _prepared(sweep: Sweep, trial: Trial, common: Sequence[str], console: Console) -> Prepared:
    own = [f"run.dir={quoted(str(sweep.path / trial.name))}", f"run.name={quoted(trial.name)}"]
    overrides = [word for word in common if "=" in word and not word.startswith("--")]
    flags = Flags(overrides=[*overrides, *trial.overrides, *own], config_dirs=sweep.config_dirs)
    return prepare(Command(None, flags, json=False), console)


def _record(sweep: Path, trial: Trial, **changes: object) -> None:
    before = read_record(record_path(sweep, trial.name)) or Record(trial.name, trial.number, dict(trial.values))
    fresh: dict[str, object] = {"status": "running", "reason": "", "objective": {}}
    write_record(sweep, replace(before, **(fresh | changes)))  # type: ignore[arg-type]


@contextmanager
def _released(ready: Sequence[tuple[Trial, Prepared]]) -> Iterator[None]:
    """Give the locks of the run directories back: the jobs hold none."""
    try:
        yield
    finally:
        for _, prepared in ready:
            if prepared.lock is not None:
                os.close(prepared.lock)
