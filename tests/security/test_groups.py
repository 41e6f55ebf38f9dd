"""Ranks send each other objects only after each has proven that it knows the launch's secret."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dstune.core import rendezvous
from dstune.core.rank_env import GROUP_SECRET

RANKS = Path(__file__).with_name("group_ranks.py")


def start(tmp_path: Path, secrets: list[str | None]) -> list[tuple[int, str]]:
    processes = []
    for rank, secret in enumerate(secrets):
        env = {**os.environ, **({GROUP_SECRET: secret} if secret else {})}
        command = [sys.executable, str(RANKS), str(rank), str(len(secrets)), str(tmp_path / "store")]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    ended = [process.communicate(timeout=120)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, ended, strict=True)]


def test_ranks_of_one_launch_know_each_other(tmp_path: Path) -> None:
    assert start(tmp_path, ["s" * 32, "s" * 32]) == [(0, "received 2\n")] * 2


def test_a_stranger_in_the_place_of_a_rank_is_refused_before_the_first_object(tmp_path: Path) -> None:
    (code, output), _ = start(tmp_path, ["s" * 32, "guessed"])
    assert code == 3
    assert "does not belong to this launch" in output
    assert "received" not in output


def test_the_secret_of_a_slurm_job_is_for_this_user_alone(tmp_path: Path) -> None:
    rendezvous.leave_secret(tmp_path)
    file = tmp_path / rendezvous.SECRET_FILE
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    variables: dict[str, str] = {}
    rendezvous._read_secret(tmp_path, variables)
    assert variables[GROUP_SECRET] == file.read_text()
    file.chmod(0o644)
    exposed: dict[str, str] = {}
    rendezvous._read_secret(tmp_path, exposed)
    assert exposed == {}


def test_a_local_launch_meets_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank listens where another user of the machine could connect first."""
    from dstune.core.rank_env import STORE
    from dstune.launch.commands import Machine, local_plan
    from dstune.launch.console import Console
    from dstune.launch.local import supervise
    from dstune.launch.local.config import LocalConfig

    seen: list[dict[str, str]] = []

    class Rank(subprocess.Popen):
        def __init__(self, argv, env=None, **options):
            if env is not None and STORE in env:
                seen.append({**env, "mode": oct(stat.S_IMODE(Path(env[STORE]).parent.stat().st_mode))})
            super().__init__(
                [sys.executable, "-c", ""] if env is not None and STORE in env else argv, env=env, **options
            )

    monkeypatch.setattr(supervise.subprocess, "Popen", Rank)
    from support.configs import run_config

    run_dir = tmp_path / "run"
    (run_dir / "logs").mkdir(parents=True)
    launch, console = LocalConfig(processes=2), Console()
    config = run_config(launch=launch)
    plan = local_plan(config, run_dir, machine=Machine(gpus=0, cores=2), console=console.kind)
    supervise.run(config, run_dir, launch, plan=plan, console=console)
    assert len(seen) >= 1
    assert {env["mode"] for env in seen} == {"0o700"}
    assert len({(env[STORE], env[GROUP_SECRET]) for env in seen}) == 1
    assert all(len(env[GROUP_SECRET]) == 64 for env in seen)
    assert not Path(seen[0][STORE]).parent.exists(), "the folder goes with the launch"
