"""Both sides of a launch through Spark, with a double of Spark that starts a process for each task."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
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
from dstune.lakehouse.spark import refusals, stage
from dstune.lakehouse.spark import session as sessions
from dstune.lakehouse.spark.config import SparkConfig
from dstune.lakehouse.spark.task import Line
from dstune.launch import records
from dstune.launch.console import Console

SECRET = "planted-secret-7b1e"
TASK = """
import json, sys
from pathlib import Path
from dstune.lakehouse.spark.task import serve
given = json.loads(sys.stdin.readline())
print(serve(given["rank"], [], (given["driver"], given["port"]), given["token"], Path(given["run_dir"])))
"""


class Spark:
    """A session whose stage is two processes. Where one of them is killed, all start again at once, whatever the others do;
    with `repeats`, also where they have ended (what they gave was lost with a worker)."""

    def __init__(self, attempts: int = 2, *, repeats: bool = False):
        values = {"spark.driver.host": "127.0.0.1"}
        conf = SimpleNamespace(get=lambda name, default=None: values.get(name, default))
        nothing = lambda *arguments, **keywords: None  # noqa: E731
        self.sparkContext = SimpleNamespace(
            master="double", getConf=lambda: conf, setJobGroup=nothing, cancelJobGroup=nothing, defaultParallelism=2
        )
        self.attempts, self.repeats, self.tasks = attempts, repeats, []

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
            if all(task.returncode == 0 for task in self.tasks) and not self.repeats:
                return
            self.repeats = False
        for process in processes:
            process.wait()
        raise RuntimeError("Job aborted due to stage failure: Could not recover from a failed barrier ResultStage")

    def _start(self, rank: int) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", TASK], stdin=subprocess.PIPE, text=True)
        process.stdin.write(json.dumps({**self.given, "rank": rank}) + "\n")
        process.stdin.flush()
        return process


def launch(run_dir: Path, how: str, session: Spark | None = None, received: list[str] | None = None):
    run_dir.mkdir(exist_ok=True)
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
    session, cancelled = Spark(), []
    session.sparkContext.cancelJobGroup = cancelled.append
    verdict = launch(tmp_path / "run", "completes", session)
    assert verdict.exit_code == 0
    assert not cancelled, "Spark warns of a job that it does not find"
    seen = [json.loads((tmp_path / "run" / f"seen-{rank}.json").read_text()) for rank in range(2)]
    ranks = [from_environment(one) for one in seen]
    assert [(one.rank, one.world_size, one.local_rank, one.local_size) for one in ranks] == [(0, 2, 0, 2), (1, 2, 1, 2)]
    assert all(one["PLANTED_TOKEN"] == SECRET for one in seen)
    assert len({(one["MASTER_ADDR"], one["MASTER_PORT"]) for one in seen}) == 1
    assert "rank 0 of 2" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert SECRET not in (tmp_path / "run" / "launch.json").read_text()
    assert not (tmp_path / "run" / records.DRIVER).exists()


@pytest.mark.parametrize(
    ("how", "code", "reason"),
    [
        ("preempted", 75, "saved at step 3"),
        ("mistaken", 2, "is wrong"),
        ("fails", 1, "loss was not finite"),
        ("fails without a word", 1, "rank 1 ended with exit code 3"),
        ("killed", 1, "rank 1 was killed by SIGKILL"),
    ],
)
def test_how_a_run_ended(tmp_path, how, code, reason):
    verdict = launch(tmp_path / "run", how)
    assert verdict.exit_code == code
    assert reason in verdict.reason
    assert not ranks_left()


def test_ranks_that_have_ended_are_not_started_again(tmp_path):
    """Spark runs a stage once more where what it gave is lost: the run is over all the same."""
    session = Spark(repeats=True)
    assert launch(tmp_path / "run", "completes", session).exit_code == 0
    seen = (tmp_path / "run" / "seen-0.json").read_text()
    assert [task.wait() for task in session.tasks] == [0, 0]
    assert (tmp_path / "run" / "seen-0.json").read_text() == seen
    assert (tmp_path / "run" / "logs" / "rank-0.log").read_text().count("rank 0 of 2") == 1
    assert result(tmp_path / "run")["status"] == "completed"


def test_a_lost_task_that_spark_does_not_start_again_is_named(tmp_path):
    session, run_dir = Spark(attempts=1), tmp_path / "run"

    def lose_one() -> None:
        wait_until(lambda: (run_dir / "seen-1.json").exists())
        session.tasks[1].send_signal(signal.SIGKILL)

    threading.Thread(target=lose_one).start()
    verdict = launch(run_dir, "hangs", session)
    assert verdict.exit_code == 1
    assert "the task of rank 1 on" in verdict.reason
    assert "Could not recover from a failed barrier" in verdict.reason
    assert (run_dir / records.DRIVER).exists(), "its rank ends by itself: who comes next waits for that"
    wait_until(lambda: not ranks_left(), timeout=10)


def test_a_rank_that_cannot_be_started_is_a_refusal(tmp_path):
    (tmp_path / "run" / "logs" / "rank-1.log").mkdir(parents=True)
    with pytest.raises(UserError, match=r"(?s)run\.dir.*no rank can be started on .*rank-1\.log: Is a directory"):
        launch(tmp_path / "run", "completes")
    assert not ranks_left()


def test_java_that_is_gone_hides_nothing(tmp_path):
    def gone(*arguments: object) -> None:
        raise ConnectionRefusedError("py4j")

    session, received = Spark(), []
    session.sparkContext.cancelJobGroup = gone
    session.collect = lambda: time.sleep(3.0)
    threading.Timer(0.5, received.append, ["SIGTERM"]).start()
    assert launch(tmp_path / "run", "completes", session, received).exit_code == 75


def test_a_signal_before_all_tasks_are_there_ends_the_wait(tmp_path):
    session, received = Spark(), []
    session.collect = lambda: time.sleep(3.0)  # Spark has no slots free
    threading.Timer(0.5, received.append, ["SIGTERM"]).start()
    verdict = launch(tmp_path / "run", "completes", session, received)
    assert (verdict.exit_code, verdict.reason) == (75, "received SIGTERM before training began")


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
    monkeypatch.setattr(stage, "RANK_END_SECONDS", 0.5)
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


def test_a_driver_that_is_gone_takes_its_ranks_along(tmp_path, monkeypatch):
    """The driver's end closes its connections, and the tasks end their ranks."""
    program = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\nfrom lakehouse.test_spark_stage import launch\n"
        "launch(Path(sys.argv[1]), 'hangs')\n"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "run"), str(ROOT), str(ROOT / "tests")]
    driver = subprocess.Popen(words)
    wait_until(lambda: (tmp_path / "run" / "seen-1.json").exists())
    driver.kill()
    driver.wait()
    wait_until(lambda: not ranks_left(), timeout=10)
    # Who starts the run again, however, waits until the ranks of before have ended, wherever they were.
    waited: list[float] = []
    reported: list[str] = []
    monkeypatch.setattr(records.time, "sleep", waited.append)
    records.wait_for_former_ranks(tmp_path / "run", reported.append)
    assert waited and 0 < waited[0] <= stage.SILENT_SECONDS + stage.RANK_END_SECONDS + 0.5
    assert "until its ranks have ended" in reported[0]
    os.utime(tmp_path / "run" / records.DRIVER, (1, 1))
    records.wait_for_former_ranks(tmp_path / "run", reported.append)
    assert len(waited) == 1
    (tmp_path / "run" / records.DRIVER).unlink()
    os.mkfifo(tmp_path / "run" / records.DRIVER)
    with pytest.raises(UserError, match="not a regular file"):
        records.wait_for_former_ranks(tmp_path / "run", reported.append)


def test_strangers_and_workers_that_do_not_fit_are_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("")
    spark = SparkConfig(processes=2)
    made = stage.Stage(run_config(launch=spark), tmp_path, spark, Console(), 2, None)
    hello = {"host": "h", "sees": "other", "gpus": [], "unused": 0, "dstune": "0.0", "address": "a", "port": 1}
    with pytest.raises(UserError) as caught:
        refusals.check({0: hello, 1: {**hello, "gpus": ["0"]}}, tmp_path)
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
        made._identify(line, [message])
    assert closed == [True] * 3
    assert not made._waiting


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        ([["0"], ["1"]], None),
        ([["0"], ["0"]], "several GPUs, or several tasks one"),
        ([["0", "1"], ["2", "3"]], "several GPUs, or several tasks one"),
        ([[], []], "gives the tasks none of the GPUs on h"),
    ],
)
def test_each_rank_has_a_device_of_its_own_or_is_told_why_not(tmp_path, monkeypatch, devices, reason):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "run.yaml").write_text("")
    hello = {"host": "h", "sees": refusals.digest_of(tmp_path / "run.yaml"), "dstune": refusals.__version__}
    hellos = {rank: {**hello, "gpus": own, "unused": 0 if own else 2} for rank, own in enumerate(devices)}
    if reason is None:
        refusals.check(hellos, tmp_path)
        return
    with pytest.raises(UserError, match=reason):
        refusals.check(hellos, tmp_path)
    if not devices[0]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        refusals.check(hellos, tmp_path)


def test_the_causes_that_are_the_users_to_change(tmp_path):
    spark = SparkConfig(processes=2)
    text = "An error occurred while calling o99.collectToPython.\n: org.apache.spark.SparkException: [SPARK-24942]: Barrier ..."
    for failure, key in ((text, "dynamicAllocation"), ("x\nNo module named 'dstune'\n", "no dstune")):
        made = stage.Stage(run_config(launch=spark), tmp_path, spark, Console(), 2, None)
        made._failure = refusals.cause(failure)
        with pytest.raises(UserError, match=key):
            made._judge()
    assert refusals.cause(text.replace("[SPARK-24942]: Barrier", "no such host")).endswith(
        "SparkException: no such host ..."
    )


def test_a_driver_with_many_open_files_hears_its_tasks():
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(2048, most)), most))
    high = socket.socket(fileno=fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, 1500))
    try:
        line = Line(high)
        assert line.receive(0.0) == [] and line.open
        theirs.sendall(b'{"rank": 1}\n')
        assert line.receive(1.0) == [{"rank": 1}]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))
        for connection in (ours, theirs, high):
            connection.close()


def test_where_tasks_run_is_known_before_spark_starts(tmp_path, monkeypatch):
    for name in ("PYSPARK_GATEWAY_PORT", "MASTER", "PYSPARK_SUBMIT_ARGS", "SPARK_CONF_DIR", "SPARK_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sessions, "existing", lambda: None)
    assert sessions.master_of(SparkConfig()) == "local[2]"
    assert sessions.master_of(SparkConfig(processes=3)) == "local[3]"
    assert sessions.master_of(SparkConfig(master="spark://h:1")) == "spark://h:1"
    monkeypatch.setenv("PYSPARK_GATEWAY_PORT", "1")  # spark-submit --master yarn dstune train
    assert sessions.master_of(SparkConfig()) is None
    monkeypatch.delenv("PYSPARK_GATEWAY_PORT")
    (tmp_path / "spark-defaults.conf").write_text("# mine\nspark.master   spark://h:7077\n")
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
    assert sessions.master_of(SparkConfig()) is None


def test_slots_are_counted_before_the_stage(monkeypatch):
    found = iter([0, 1, 4, 4, 4, 4, 4, 4])
    conf = SimpleNamespace(get=lambda name, default=None: default)
    context = SimpleNamespace(master="spark://h:1", defaultParallelism=2, getConf=lambda: conf)
    monkeypatch.setattr(sessions, "slots", lambda context: next(found))
    monkeypatch.setattr(sessions, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(sessions, "QUIET_SECONDS", 0.05)
    assert sessions.wait_for_slots(context, None, []) == 4, "and not what was there first"
    monkeypatch.setattr(sessions, "SLOTS_SECONDS", 0.05)
    monkeypatch.setattr(sessions, "slots", lambda context: 1)
    with pytest.raises(UserError, match="Spark has 1 slot, and all ranks"):
        sessions.wait_for_slots(context, 2, [])
    context.master = "local[1]"
    monkeypatch.setattr(sessions, "SLOTS_SECONDS", 60.0)
    with pytest.raises(UserError, match="Spark has 1 slot, and all ranks"):
        sessions.wait_for_slots(context, 2, [])
    monkeypatch.setattr(sessions, "slots", lambda context: None)
    assert sessions.wait_for_slots(context, None, []) == 2
