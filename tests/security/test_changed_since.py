"""What is changed in a run directory after the launching process has looked at it, and before ranks read it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dstune.config.compose import compose
from dstune.config.run_file import Composed, read_decided, variables_for_ranks, write_run
from dstune.config.schema import RunConfig
from dstune.core import plugins
from dstune.core.errors import UserError
from dstune.core.rank_env import RUN_SHA256
from dstune.lakehouse.spark.config import SparkConfig
from dstune.launch import records
from dstune.launch.commands import Machine, local_plan
from dstune.launch.console import Console
from dstune.launch.hostfile.commands import host_tasks
from dstune.launch.hostfile.config import HostfileConfig
from dstune.launch.local import supervise
from dstune.launch.local.config import LocalConfig
from dstune.launch.openmpi.commands import mpirun_plan
from dstune.launch.openmpi.config import OpenMpiConfig
from dstune.launch.remote_commands import variables_of
from dstune.launch.slurm.config import SlurmConfig
from dstune.launch.slurm.script import SCRIPT, job_script
from dstune.launch.slurm.submit import submit

HOSTS = {"a": [0], "b": [0]}


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunConfig, Path]:
    config = compose(["data.train=rows.jsonl", "launch.processes=1", f"run.dir={tmp_path / 'run'}"]).config
    (tmp_path / "run" / "logs").mkdir(parents=True)
    write_run(tmp_path / "run" / "run.yaml", Composed(config, []))
    return config, tmp_path / "run"


def swapped(run_dir: Path) -> None:
    """What somebody who may write into the folder does to its `run.yaml`."""
    file = run_dir / "run.yaml"
    text = file.read_text()
    assert "trust_remote_code: false" in text
    file.write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))


def test_ranks_obey_no_other_run_than_the_launcher_wrote(run: tuple[RunConfig, Path]) -> None:
    """A real rank, whose `run.yaml` was changed after it was written and before the rank reads it."""
    config, run_dir = run
    plan = local_plan(config, run_dir, machine=Machine(gpus=0, cores=1))
    swapped(run_dir)
    launch = config.launch
    assert isinstance(launch, LocalConfig)
    with pytest.raises(UserError, match="was changed after the command that started these ranks wrote it"):
        supervise.run(config, run_dir, launch, plan=plan, console=Console())


def test_a_run_that_nobody_changed_is_read(run: tuple[RunConfig, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config, run_dir = run
    for name, value in variables_for_ranks(run_dir).items():
        monkeypatch.setenv(name, value)
    assert read_decided(run_dir / "run.yaml").config == config
    write_run(run_dir / "run.yaml", Composed(replace(config, run=replace(config.run, name="another")), []))
    with pytest.raises(UserError, match="was changed after"):  # of the launch before
        read_decided(run_dir / "run.yaml")


def _local(config: RunConfig, run_dir: Path) -> object:
    return [env[RUN_SHA256] for env in local_plan(config, run_dir, machine=Machine(gpus=0, cores=1)).env]


def _hostfile(config: RunConfig, run_dir: Path) -> object:
    config = replace(config, launch=HostfileConfig(hostfile="hosts"))
    tasks = host_tasks(config, run_dir, HOSTS, launch_id="id", parent=os.environ, on_cpu=True)
    return [task.variables for task in tasks]


def _openmpi(config: RunConfig, run_dir: Path) -> object:
    config = replace(config, launch=OpenMpiConfig())
    fixed = {"parent": os.environ, "program": "mpirun", "as_root": False, "on_cpu": True}
    plan = mpirun_plan(config, run_dir, HOSTS, launch_id="id", **fixed)
    return plan.env[RUN_SHA256] if RUN_SHA256 in plan.argv else "not handed over"


def _slurm(config: RunConfig, run_dir: Path) -> object:
    launch = SlurmConfig()
    return job_script(replace(config, launch=launch), launch, run_dir, os.environ)


def _spark(config: RunConfig, run_dir: Path) -> object:
    launch = SparkConfig()
    return variables_of(replace(config, launch=launch), run_dir, launch, "id", os.environ, on_cpu=True)[0]


@pytest.mark.parametrize("launcher", [_local, _hostfile, _openmpi, _slurm, _spark])
def test_every_launcher_tells_ranks_which_run_is_theirs(
    launcher: Callable[[RunConfig, Path], object], run: tuple[RunConfig, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUN_SHA256, "of a run around this one")
    config, run_dir = run
    swapped(run_dir)  # the digest is of what was written, not of what is there
    (sha256,) = variables_for_ranks(run_dir).values()
    given = str(launcher(config, run_dir))
    assert sha256 in given
    assert "of a run around this one" not in given


def test_ranks_of_another_launcher_obey_what_rank_0_wrote(run: tuple[RunConfig, Path]) -> None:
    from dstune.rank.worker import _prepare_for_all

    config, run_dir = run
    _, given = _prepare_for_all(lambda: (config, run_dir, run_dir))
    assert given["variables"] == variables_for_ranks(run_dir)


def test_a_process_of_a_rank_executes_no_other_plugin(tmp_path: Path) -> None:
    """Processes that a rank starts import its plugins from the run directory again."""
    file = tmp_path / "mine.py"
    file.write_text("print('the one of the run')\n")
    source = plugins.plugin_files.find(str(file))
    listed = [{"name": "mine", "path": str(file), "sha256": source.sha256, "is_file": True}]
    command = [sys.executable, "-c", "from dstune.core import plugins; plugins.load_installed()"]
    environment = {**os.environ, plugins.VARIABLE: json.dumps(listed)}
    own = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert own.stdout == "the one of the run\n", own.stderr
    file.write_text("print('another one')\n")
    other = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert other.stdout == ""
    assert "the plugin mine has changed since this process began" in other.stderr


def test_a_job_is_submitted_as_it_was_written(
    run: tuple[RunConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run_dir = run
    launch = SlurmConfig()
    begin = records.begin

    def swapped_meanwhile(*given: Any) -> None:
        (run_dir / SCRIPT).write_text("#!/bin/sh\nrun what somebody else wrote\n")
        begin(*given)

    monkeypatch.setattr(records, "begin", swapped_meanwhile)
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\nshift\ncat "$@" >{tmp_path}/submitted\necho 41\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert submit(replace(config, launch=launch), launch, run_dir) == ["41"]
    submitted = (tmp_path / "submitted").read_text()
    assert "dstune.worker" in submitted
    assert "somebody else" not in submitted
