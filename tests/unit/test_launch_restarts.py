"""When a failed launch is tried again, and when it is not."""

from __future__ import annotations

import errno
import io
import json
import os

import pytest
from support.configs import run_config

from dstune.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER
from dstune.launch.commands import Machine, local_plan
from dstune.launch.console import Console
from dstune.launch.local import restarts, supervise
from dstune.launch.local.config import LocalConfig
from dstune.launch.local.restarts import Restarts
from dstune.launch.verdict import Ended, Verdict


class Log:
    def __init__(self, *lines: str):
        self.lines = list(lines)

    def last_lines(self, rank: int, count: int = 20) -> list[str]:
        return self.lines


@pytest.fixture
def waited(monkeypatch) -> list[float]:
    """Time stands still but for what is slept."""
    slept: list[float] = []
    monkeypatch.setattr(restarts.time, "sleep", slept.append)
    monkeypatch.setattr(restarts.time, "monotonic", lambda: sum(slept))
    return slept


def failed(code: int = 1) -> Verdict:
    return Verdict(EXIT_FAILED, f"rank 1 ended with exit code {code}", Ended(1, code, 0))


def at_step(run_dir, step: int) -> None:
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": step, "loss": 1.0}) + "\n")


@pytest.mark.parametrize("code", [EXIT_DONE, EXIT_PREEMPTED, EXIT_USER])
def test_only_a_failure_is_tried_again(tmp_path, waited, code):
    verdict, again = Restarts(3, tmp_path, Console(io.StringIO()), []).consider(Verdict(code, "so"), Log())
    assert not again
    assert verdict.reason == "so"
    assert not waited


def test_without_restarts_a_failure_is_the_end(tmp_path, waited):
    assert not Restarts(0, tmp_path, Console(io.StringIO()), []).consider(failed(), Log("ValueError: x"))[1]


def test_each_wait_is_longer_and_the_number_is_limited(tmp_path, waited):
    decide = Restarts(3, tmp_path, Console(io.StringIO()), [])
    waits = []
    for step in (4, 8, 10):
        at_step(tmp_path, step)
        before = sum(waited)
        assert decide.consider(failed(), Log("OSError: no route"))[1]
        waits.append(round(sum(waited) - before))
    assert waits == [0, 5, 10]
    at_step(tmp_path, 12)
    verdict, again = decide.consider(failed(), Log("OSError: no route"))
    assert not again
    assert "launch.restarts" in verdict.reason


def test_a_new_checkpoint_ends_the_row_of_waits(tmp_path, waited, monkeypatch):
    decide = Restarts(9, tmp_path, Console(io.StringIO()), [])
    waits = []
    for step, checkpoint in ((4, 3), (5, 3), (6, 3), (9, 8), (10, 8), (11, 3), (12, 11)):
        monkeypatch.setattr(
            restarts.store, "resumable", lambda run_dir, saved=checkpoint: run_dir / f"step-{saved:08d}"
        )
        at_step(tmp_path, step)
        before = sum(waited)
        assert decide.consider(failed(), Log("OSError: no route"))[1]
        waits.append(round(sum(waited) - before))
    assert waits == [0, 5, 10, 0, 5, 10, 0]  # where step 8 was found damaged, step 3 is no progress


def test_the_same_exception_at_the_same_step_ends_with_the_diagnosis(tmp_path, waited):
    decide = Restarts(9, tmp_path, Console(io.StringIO()), [])
    at_step(tmp_path, 7)
    assert decide.consider(failed(), Log("Traceback", "ValueError: bad row"))[1]
    assert decide.consider(failed(), Log("Traceback", "ValueError: another"))[1]  # another exception
    verdict, again = decide.consider(failed(), Log("Traceback", "ValueError: bad row"))
    assert not again
    assert "twice after step 7" in verdict.reason
    assert "ValueError: bad row" in verdict.reason


def test_a_restart_says_its_cause_once(tmp_path, waited, capsys):
    decide = Restarts(9, tmp_path, Console(io.StringIO()), [])
    killed = Verdict(EXIT_FAILED, "rank 1 was killed by SIGKILL", Ended(1, -9, 0))
    assert decide.consider(killed, Log("step 3"))[1]
    assert capsys.readouterr().err.count("SIGKILL") == 1
    assert decide.consider(killed, Log("step 3"))[0].reason.count("SIGKILL") == 1  # the same failure again
    assert decide.consider(failed(), Log("Traceback", "ValueError: bad row"))[1]
    said = capsys.readouterr().err
    assert said.count("rank 1 ended with exit code 1") == said.count("ValueError: bad row") == 1


@pytest.mark.parametrize("allowed", [0, 3])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_on_a_full_disk_nothing_is_started_again(tmp_path, waited, monkeypatch, allowed, number):
    def refuse(*arguments, **settings):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(restarts.files, "write", refuse)
    verdict, again = Restarts(allowed, tmp_path, Console(io.StringIO()), []).consider(failed(), Log("OSError: x"))
    assert not again
    assert os.strerror(number) in verdict.reason
    assert verdict.reason.count(f"`dstune train {tmp_path}`") == 1
    assert Restarts(0, tmp_path, Console(io.StringIO()), []).consider(verdict, Log())[0].reason == verdict.reason


def test_ranks_that_a_full_disk_keeps_from_starting(tmp_path, monkeypatch, capsys):
    def refuse(run_dir, launch_id, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run_dir / "launch.json"))

    monkeypatch.setattr(supervise.records, "begin", refuse)
    config = run_config(launch=LocalConfig(processes=2, restarts=2, warm=False))
    plan = local_plan(config, tmp_path, machine=Machine(gpus=0, cores=2), console="plain")
    code = supervise.run(config, tmp_path, config.launch, plan=plan, console=Console(io.StringIO()))
    assert code == EXIT_FAILED
    said = capsys.readouterr().err
    assert "the ranks cannot be started: [Errno 28] No space left on device" in said


def test_a_run_directory_that_cannot_be_written_to_for_another_reason_is_not_full(tmp_path, waited):
    decide = Restarts(3, tmp_path / "removed", Console(io.StringIO()), [])
    assert decide.consider(failed(), Log("OSError: x"))[1]


def test_progress_of_a_first_stage_counts(tmp_path, waited):
    decide = Restarts(9, tmp_path, Console(io.StringIO()), [])
    (tmp_path / "language_model").mkdir()
    for step in (3, 9):
        at_step(tmp_path / "language_model", step)
        assert decide.consider(failed(), Log("Traceback", "OSError: no route"))[1], step


def test_a_request_to_stop_ends_the_wait(tmp_path, monkeypatch):
    received: list[str] = []
    monkeypatch.setattr(restarts.time, "sleep", lambda seconds: received.append("SIGTERM"))

    def second_failure() -> tuple[Verdict, bool]:
        decide = Restarts(3, tmp_path, Console(io.StringIO()), received)
        assert decide.consider(failed(), Log("OSError: x"))[1]  # at once
        return decide.consider(failed(), Log("OSError: y"))

    verdict, again = second_failure()
    assert (verdict.exit_code, again) == (EXIT_FAILED, False)  # nothing was saved

    received.clear()
    monkeypatch.setattr(restarts.store, "resumable", lambda run_dir: run_dir / "checkpoints" / "step-00000005")
    verdict, again = second_failure()
    assert (verdict.exit_code, again) == (EXIT_PREEMPTED, False)
