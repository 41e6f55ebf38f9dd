"""`dstune cancel`, `status` and the scripts of launchers with records and values that somebody prepared."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dstune import cli
from dstune.config.compose import compose
from dstune.config.validate import validate
from dstune.core.errors import UserError
from dstune.launch import records
from dstune.launch.slurm.script import job_script


@pytest.fixture
def bystander() -> Iterator[psutil.Popen]:
    """A process of this user that is no launch."""
    with psutil.Popen([sys.executable, "-c", "import time; time.sleep(300)"]) as process:
        yield process
        process.kill()


def prepared(folder: Path, record: dict[str, object]) -> Path:
    folder.mkdir()
    (folder / "run.yaml").write_text("config: {}\n")
    (folder / "launch.json").write_text(json.dumps(record))
    (folder / records.LOCK).touch()
    return folder


def test_cancel_leaves_processes_alone_that_are_no_launch(tmp_path: Path, bystander: psutil.Popen) -> None:
    record = {
        "id": "x",
        "pid": bystander.pid,
        "started": bystander.create_time(),
        "host": socket.gethostname(),
        "processes": 1,
        "jobs": [],
    }
    assert cli.main(["cancel", str(prepared(tmp_path / "run", record)), "--now"]) == 0
    assert bystander.poll() is None


@pytest.mark.parametrize(
    "change",
    [
        {"jobs": ["--user=me"]},
        {"jobs": ["1; touch /tmp/owned"]},
        {"jobs": "12"},
        {"jobs": ["123.pbs-server"]},
        {"jobs": ["--user=me"], "launcher": "absent"},
        {"jobs": ["1;reboot"], "launcher": "absent"},
        {"jobs": ["1 2"], "launcher": "absent"},
        {"launcher": None},
        {"pid": -1},
        {"pid": "1"},
        {"pid": 1.5},
        {"started": None},
        {"host": 3},
        {"more": 1},
    ],
)
def test_a_record_that_is_none_counts_for_nothing(change: dict[str, object], tmp_path: Path) -> None:
    record = {"id": "x", "pid": 1, "started": 1.0, "host": socket.gethostname(), "processes": 1, "jobs": ["12", "13_4"]}
    assert records.read_launch(prepared(tmp_path / "good", record)) is not None
    assert records.read_launch(prepared(tmp_path / "bad", record | change)) is None


def slurm(*overrides: str) -> None:
    composed = compose(["experiment=quickstart", "launch=slurm", *overrides])
    validate(composed.config)


INJECTED = "run\ntouch /tmp/owned"


@pytest.mark.parametrize(
    "override",
    [
        f'run.dir="{INJECTED}"',
        f'run.name="{INJECTED}"',
        f'launch.partition="{INJECTED}"',
        "launch.partition='gpu\" --wrap=\"x'",
        "launch.account='a\" --uid=0'",
        f'launch.directives=["{INJECTED}"]',
        f'launch.srun_options=["{INJECTED}"]',
        'launch.time="1:00:00\r#SBATCH --uid=0"',
    ],
)
def test_no_value_begins_a_line_or_an_option_of_the_script(override: str) -> None:
    with pytest.raises(UserError) as caught:
        slurm(override)
    key = override.partition("=")[0]
    assert any(problem.where == key for problem in caught.value.problems)


def test_ordinary_values_of_a_script_pass() -> None:
    slurm(
        "launch.partition=gpu-a100",
        "launch.constraint='a100&ib|[r1*2]'",
        "launch.account=proj_1",
        "run.dir='runs/my run'",
    )


def test_a_script_is_one_even_past_validation(tmp_path: Path) -> None:
    config = compose(["experiment=quickstart", "launch=slurm"]).config
    with pytest.raises(UserError, match="control character"):
        job_script(config, config.launch, tmp_path / "a\ntouch owned", {})
