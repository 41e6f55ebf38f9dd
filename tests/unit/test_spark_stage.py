"""Both sides of a launch through Spark, with a double of Spark that starts a process for each task."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from support.command import ROOT, result, wait_until
from support.configs import run_config

from dstune.core.errors import UserError
from dstune.core.rank_env import from_environment
from dstune.launch.console import Console
from dstune.launch.spark import stage
from dstune.launch.spark.config import SparkConfig

SECRET = "planted-secret-7b1e"
TASK = """
import json, sys
from pathlib import Path
from dstune.launch.spark.task import serve
given = json.loads(sys.stdin.readline())
print(serve(given["rank"], [], (given["driver"], given["port"]), given["token"], Path(given["run_dir"])))
"""


class Spark:
    """A session whose stage is two processes. Where one of them is killed, all start again at once, whatever the others do."""

    def __init__(self, attempts: int = 2):
        values = {"spark.driver.host": "127.0.0.1"}
        conf = SimpleNamespace(get=lambda name, default=None: values.get(name, default))
        nothing = lambda *arguments, **keywords: None  # noqa: E731
        self.sparkContext = SimpleNamespace(
            master="double", getConf=lambda: conf, setJobGroup=nothing, cancelJobGroup=nothing, defaultParallelism=2
        )
        self.attempts, self.tasks = attempts, []

    def range(self, start: int, end: int, step: int, parts: int) -> Spark:
        self.size = parts
        return self

    def mapInArrow(self, task, schema: str, *, barrier: bool) -> Spark:
        assert barrier
        self.given = dict(task.keywords)
        return self

    def repartition(self, parts: int) -> Spark:
        return self

    def collect(self) -> None:
        processes: list[subprocess.Popen] = []
        for _ in range(self.attempts):
            self.tasks = [self._start(rank) for rank in range(self.size)]
            processes += self.tasks
            while not all(task.poll() is not None for task in self.tasks):
                if any((task.poll() or 0) < 0 for task in self.tasks):
                    break
                time.sleep(0.02)
            if all(task.returncode == 0 for task in self.tasks):
                return
        for process in processes:
            process.wait()
        raise RuntimeError("Job aborted due to stage failure: Could not recover from a failed barrier ResultStage")

    def _start(self, rank: int) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", TASK], stdin=subprocess.PIPE, text=True)
        process.stdin.write(json.dumps({**self.given, "rank": rank}) + "\n")
        process.stdin.flush()
        return process


def launch(run_dir: Path, how: str, session: Spark | None = None, received: list[str] | None = None):
    run_dir.mkdir()
    (run_dir / "run.yaml").write_text("")
    spark = SparkConfig(processes=2, grace_seconds=0.5, export_env=["PLANTED_TOKEN"])
    made = stage.Stage(
        run_config(launch=spark), run_dir, spark, Console(), 2, ["support.spark_rank", how, str(run_dir)]
    )
    return made.run(session or Spark(), received if received is not None else [])


class Closable:
    """A connection that only notes that it was closed."""

    open = True

    def __init__(self, closed: list[bool]):
        self._closed = closed

    def close(self) -> None:
        self._closed.append(True)


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    monkeypatch.setenv("PLANTED_TOKEN", SECRET)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")


def ranks_left() -> list[psutil.Process]:
    return [one for one in psutil.process_iter(["cmdline"]) if "support.spark_rank" in (one.info["cmdline"] or [])]


def test_ranks_and_what_they_know(tmp_path):
    verdict = launch(tmp_path / "run", "completes")
    assert verdict.exit_code == 0
    seen = [json.loads((tmp_path / "run" / f"seen-{rank}.json").read_text()) for rank in range(2)]
    ranks = [from_environment(one) for one in seen]
    assert [(one.rank, one.world_size, one.local_rank, one.local_size) for one in ranks] == [(0, 2, 0, 2), (1, 2, 1, 2)]
    assert all(one["PLANTED_TOKEN"] == SECRET for one in seen)
    assert len({(one["MASTER_ADDR"], one["MASTER_PORT"]) for one in seen}) == 1
    assert "rank 0 of 2" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert SECRET not in (tmp_path / "run" / "launch.json").read_text()
    assert not (tmp_path / "run" / stage.ALIVE).exists()


@pytest.mark.parametrize(
    ("how", "code", "reason"),
    [
        ("preempted", 75, "saved at step 3"),
        ("mistaken", 2, "is wrong"),
        ("fails", 1, "loss was not finite"),
        ("killed", 1, "rank 1 was killed by SIGKILL"),
    ],
)
def test_how_a_run_ended(tmp_path, how, code, reason):
    verdict = launch(tmp_path / "run", how)
    assert verdict.exit_code == code
    assert reason in verdict.reason
    assert not ranks_left()


def test_a_request_to_stop_and_a_second_one(tmp_path):
    received: list[str] = []
    threading.Timer(1.5, received.append, ["SIGTERM"]).start()
    assert launch(tmp_path / "asked", "waits for STOP", received=received).exit_code == 75
    assert not (tmp_path / "asked" / "STOP").exists()
    received = []
    threading.Timer(1.5, received.extend, [["SIGTERM", "SIGTERM"]]).start()
    verdict = launch(tmp_path / "forced", "hangs", received=received)
    assert (verdict.exit_code, verdict.reason) == (1, "stopped at once by a second signal")
    assert not ranks_left()


def test_attempts_never_overlap(tmp_path, monkeypatch):
    """A task is lost: Spark starts all of them again, and their ranks begin when no rank of before can be there any more."""
    monkeypatch.setattr(stage, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(stage, "SETTLE_SECONDS", 0.5)
    session, run_dir, most = Spark(), tmp_path / "run", []

    def lose_one() -> None:
        wait_until(lambda: (run_dir / "seen-0.json").exists() and (run_dir / "seen-1.json").exists())
        for name in ("seen-0.json", "seen-1.json"):
            (run_dir / name).unlink()
        session.tasks[1].send_signal(signal.SIGKILL)
        while not (run_dir / "seen-0.json").exists():
            most.append(len(ranks_left()))
            time.sleep(0.05)
        (run_dir / "STOP").touch()

    thread = threading.Thread(target=lose_one)
    thread.start()
    verdict = launch(run_dir, "waits for STOP", session)
    thread.join()
    assert verdict.exit_code == 75
    assert max(most) <= 2
    assert 0 in most
    assert result(run_dir)["status"] == "preempted"


def test_a_driver_that_is_gone_takes_its_ranks_along(tmp_path):
    """The driver's end closes its connections, and the tasks end their ranks."""
    program = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\nfrom unit.test_spark_stage import launch\n"
        "launch(Path(sys.argv[1]), 'hangs')\n"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "run"), str(ROOT), str(ROOT / "tests")]
    driver = subprocess.Popen(words)
    wait_until(lambda: (tmp_path / "run" / "seen-1.json").exists())
    driver.kill()
    driver.wait()
    wait_until(lambda: not ranks_left(), timeout=10)
    # Who starts the run again waits until the ranks of before have ended, wherever they were.
    assert (tmp_path / "run" / stage.ALIVE).exists()
    waited: list[str] = []
    spark = SparkConfig(processes=2, grace_seconds=0.5)
    console = SimpleNamespace(message=waited.append)
    stage.Stage(run_config(launch=spark), tmp_path / "run", spark, console, 2, None)._wait_for_former(["SIGTERM"])
    assert "until its ranks have ended" in waited[0]


def test_strangers_and_workers_that_do_not_fit_are_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("")
    spark = SparkConfig(processes=2)
    made = stage.Stage(run_config(launch=spark), tmp_path, spark, Console(), 2, None)
    hello = {"host": "h", "sees": "other", "gpus": [], "dstune": "0.0", "address": "a", "port": 1}
    with pytest.raises(UserError) as caught:
        made._check({0: hello, 1: {**hello, "gpus": ["0"]}})
    for reason in (
        "the workers do not share this file system",
        "the workers have dstune 0.0",
        "have no GPU, and others have",
    ):
        assert reason in str(caught.value)
    closed: list[bool] = []
    line = Closable(closed)
    for message in ({"token": "guessed", "rank": 0}, {"token": made._token, "rank": 7}, {"rank": 0}):
        made._strangers = {line: time.monotonic()}
        made._meet(line, [message])
    assert closed == [True] * 3
    assert not made._waiting
