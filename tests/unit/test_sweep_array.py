"""A sweep as an array of SLURM jobs: its script, and what it cannot be."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dstune.config.sweep_schema import GridConfig, OptunaConfig
from dstune.config.sweep_space import split
from dstune.launch.slurm.array import array_script
from dstune.launch.slurm.config import SlurmConfig
from dstune.sweep.array import is_array, problems
from tests.support.configs import run_config

LAUNCH = SlurmConfig(wait=False, gpus=2, partition="gpu", time="1:00:00")


def test_the_script(tmp_path: Path):
    config = run_config(launch=LAUNCH, sweep=GridConfig(parallel=3))
    runs = [tmp_path / name for name in ("lr=1", "it's", "lr=2")]
    text = array_script(config, LAUNCH, tmp_path, runs, {"PATH": "/bin", "SECRET_TOKEN": "hidden"})
    header = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --array=0-2%3" in header
    assert "#SBATCH --gres=gpu:2" in header
    assert "#SBATCH --partition=gpu" in header
    assert f"#SBATCH --output={tmp_path}/logs/slurm-%A_%a.log" in header
    assert sum("--output" in line for line in header) == 1
    assert "hidden" not in text
    for at, run in enumerate(runs):
        (run / "launch").mkdir(parents=True)
        (run / "launch" / "job.sbatch").write_text(f"echo task {at} ${{SLURM_ARRAY_TASK_ID}}")
    for at in range(3):
        command = ["bash", "-c", text]
        done = subprocess.run(
            command, env={"SLURM_ARRAY_TASK_ID": str(at), "PATH": "/bin:/usr/bin"}, capture_output=True
        )
        assert done.stdout.decode() == f"task {at} {at}\n"


@pytest.mark.parametrize(
    ("launch", "sweep", "axes", "where"),
    [
        (LAUNCH, OptunaConfig(), ["trainer.seed=1,2"], "launch.wait"),
        (LAUNCH, GridConfig(), ["launch.processes=1,2"], "launch.processes"),
        (SlurmConfig(wait=False, chain=2, requeue=False), GridConfig(), ["trainer.seed=1,2"], "launch.chain"),
    ],
)
def test_what_is_no_array(launch, sweep, axes, where):
    config = run_config(launch=launch, sweep=sweep)
    assert [problem.where for problem in problems(config, split(axes, {}).axes)] == [where]


def test_a_sweep_that_waits_is_none():
    config = run_config(launch=SlurmConfig(), sweep=OptunaConfig())
    assert not is_array(config)
    assert list(problems(config, split(["launch.processes=1,2"], {}).axes)) == []
