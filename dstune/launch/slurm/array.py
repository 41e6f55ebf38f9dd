"""Submits the runs of a sweep as one array of SLURM jobs, whose tasks each run the job script of one run."""

from __future__ import annotations

import os
import shlex
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from dstune.config.schema import RunConfig
from dstune.core import files
from dstune.launch import records
from dstune.launch.commands import inherited
from dstune.launch.console import Console
from dstune.launch.slurm import jobs
from dstune.launch.slurm.config import SlurmConfig
from dstune.launch.slurm.script import SCRIPT, job_script, log_pattern, options

ARRAY = Path("launch") / "array.sbatch"


def submit(
    base: RunConfig, launch: SlurmConfig, folder: Path, runs: Sequence[tuple[RunConfig, Path]], console: Console
) -> list[str]:
    """Write the scripts of `runs` and of their array, submit the array, and return the job id of each run. Raises UserError."""
    launch_id = uuid.uuid4().hex
    for config, run_dir in runs:
        assert isinstance(config.launch, SlurmConfig)
        script = run_dir / SCRIPT
        script.parent.mkdir(exist_ok=True)
        files.write(script, job_script(config, config.launch, run_dir, os.environ), mode=0o777)
        records.begin(run_dir, launch_id, launch.size)
    file = folder / ARRAY
    for parent in (file.parent, folder / "logs"):
        parent.mkdir(exist_ok=True)
    content = array_script(base, launch, folder, [run_dir for _, run_dir in runs], os.environ)
    files.write(file, content, mode=0o777)
    job = jobs.submit(content, {**os.environ, **inherited(base, os.environ)})
    tasks = [f"{job}_{task}" for task in range(len(runs))]
    for task, (_, run_dir) in zip(tasks, runs, strict=True):
        records.note(run_dir, launch_id, launch.size, [task], launch.name)
    console.stage(f"submitted array {job}: {len(runs)} jobs, {base.sweep.parallel} at a time, {file}")
    return tasks


def array_script(
    base: RunConfig, launch: SlurmConfig, sweep: Path, runs: Sequence[Path], env: Mapping[str, str]
) -> str:
    """Return the script of the array, whose tasks run the scripts of the trials in `runs`."""
    sweep = sweep.absolute()
    log = log_pattern(sweep, "slurm-%A_%a.log")
    array_options = [
        *(
            option
            for option in options(base, launch, sweep, sorted(inherited(base, env)))
            if not option.startswith("--output=")
        ),
        f"--output={shlex.quote(log)}",
        f"--array=0-{len(runs) - 1}%{base.sweep.parallel}",
    ]
    lines = [
        "#!/usr/bin/env bash",
        f"# {base.run.name}: made by `dstune train --multirun launch=slurm launch.wait=false`, and made anew by each start.",
        *(f"#SBATCH {option}" for option in array_options),
        "",
        "runs=(",
        *(f"  {shlex.quote(str(run.absolute()))}" for run in runs),
        ")",
        f'exec bash "${{runs[$SLURM_ARRAY_TASK_ID]}}/{SCRIPT}"',
        "",
    ]
    return "\n".join(lines)
