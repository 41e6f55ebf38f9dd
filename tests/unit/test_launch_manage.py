"""`status`, `cancel` and `checkpoints` over run directories, with a stand-in for the launching process."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from types import SimpleNamespace

import psutil
import pytest

from dstune import cli
from dstune.checkpoint import store
from dstune.core.errors import UserError
from dstune.finetuning.jobs import configuration, process
from dstune.finetuning.jobs.folder import JobFolder
from dstune.finetuning.jobs.presets import Preset
from dstune.launch import manage, records, runs
from dstune.protocols import LAUNCHERS, Launcher
from dstune.protocols.launcher import LaunchConfig, Queue
from tests.support.runs import write_sweep_directory

# Ends with the number of signals it got within a second: a first one asks, a second one ends at once.
LAUNCHER = """
import os, signal, sys, time
lock = os.open(os.path.join(sys.argv[1], ".lock"), os.O_RDWR | os.O_CREAT)
got = []
signal.signal(signal.SIGTERM, lambda *_: got.append(1))
print("ready", flush=True)
while not got:
    time.sleep(0.01)
time.sleep(1)
sys.exit(10 + len(got))
"""


@pytest.fixture
def run(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "run.yaml").touch()
    return run_dir


@pytest.fixture
def launcher(run):
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def record(run_dir, process, *, host=None, shift=0.0):
    started = psutil.Process(process.pid).create_time() + shift
    fields = {"id": "x", "pid": process.pid, "started": started, "processes": 2}
    records.write_json(run_dir / "launch.json", {**fields, "host": host or os.uname().nodename})


@dataclass(frozen=True)
class TorqueConfig(LaunchConfig):
    name: str = "torque"
    wait: bool = True


class Torque(Launcher):
    """As a plugin brings it."""

    Config = TorqueConfig

    class queue(Queue):
        name, cancelled = "Torque", []

        @classmethod
        def require(cls, *, cancel=False): ...

        @classmethod
        def alive(cls, ids):
            return [SimpleNamespace(id=one, is_waiting=True) for one in ids if one not in cls.cancelled]

        @classmethod
        def named(cls, name):
            return ["9.torque-server"]

        @classmethod
        def cancel(cls, ids):
            cls.cancelled += ids


def test_a_queue_of_a_plugin_answers_for_its_own_jobs(run, tmp_path):
    LAUNCHERS.add(Torque)
    try:
        records.begin(run, "x", 2, ["12.torque-server", "13[4].torque-server"], "torque")
        assert manage.status_of(run).state == "pending"
        assert cli.main(["cancel", str(run), "--now", "--json"]) == 0
        assert Torque.queue.cancelled == ["12.torque-server", "13[4].torque-server"]
        # A job of fine-tuning whose submission was killed before it was noted.
        folder = JobFolder(tmp_path)
        assert process.Training(folder, 0, "torque")._in_queue()
        assert records.read_launch(folder.run).launcher == "torque"
        assert manage.status_of(folder.run).state == "pending"
        preset = Preset("tiny", "base", launch={"name": "torque"})
        assert configuration._launch(preset) == {"wait": False}
    finally:
        LAUNCHERS.remove("torque")
    assert manage.status_of(run).state == "elsewhere", "without the plugin nobody can tell"


def test_states(run, launcher):
    assert manage.status_of(run).state == "dead"
    record(run, launcher)
    assert manage.status_of(run).state == "running"
    # Another process has the pid by now.
    record(run, launcher, shift=-3600)
    assert manage.status_of(run).state == "dead"
    record(run, launcher, host="another")
    assert manage.status_of(run).state == "elsewhere"
    records.write_json(run / "result.json", {"status": "preempted", "reason": "received SIGTERM"})
    found = manage.status_of(run)
    assert (found.state, found.reason) == ("preempted", "received SIGTERM")


def test_status_reports_the_last_step(run, launcher, capsys):
    record(run, launcher)
    rows = [{"step": 4, "loss": 2.5}, {"step": 5, "loss": 2.25}, {"step": 5, "eval/loss": 3.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "lo')
    assert manage.status([str(run), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["state"], status["step"], status["loss"], status["pid"]) == (
        "running",
        5,
        2.25,
        launcher.pid,
    )
    assert manage.status([str(run)]) == 0
    assert "step 5, loss 2.2500" in capsys.readouterr().out


def test_the_list_of_runs_names_the_step_of_an_earlier_evaluation(run, launcher, capsys):
    record(run, launcher)
    (run / "run.yaml").touch()
    rows = [{"step": 0, "eval/loss": 6.5}, {"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert runs.main([str(run.parent)]) == 0
    heading, line = capsys.readouterr().out.splitlines()[1:]
    assert heading.split()[:6] == ["run", "status", "step", "measured", "at", "loss"]
    assert line.split()[1:6] == ["running", "2", "step", "0", "6.5"]
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"step": 2, "eval/loss": 2.0}) + "\n")
    assert runs.main([str(run.parent)]) == 0
    assert "measured" not in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "signals"), [([], 1), (["--now"], 2)])
def test_cancel_asks_once_and_waits(run, launcher, capsys, flags, signals):
    record(run, launcher)
    assert manage.cancel([str(run), *flags]) == 0
    assert launcher.wait(timeout=1) == 10 + signals
    assert f"stopping process {launcher.pid}" in capsys.readouterr().out


def test_cancel_leaves_other_processes_alone(run, launcher, capsys):
    record(run, launcher, shift=-3600)
    assert manage.cancel([str(run)]) == 0
    assert "is not running (dead)" in capsys.readouterr().out
    record(run, launcher, host="another")
    with pytest.raises(UserError, match="launched on another"):
        manage.cancel([str(run)])
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=5) == 11


def test_no_run(tmp_path):
    for verb in (manage.status, manage.cancel, manage.checkpoints):
        with pytest.raises(UserError, match="no such run directory"):
            verb([str(tmp_path / "none")])


def save(run_dir, step, best=None):
    folder = run_dir / "checkpoints" / f"{store.tag(step)}{store.INCOMPLETE}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("12345")
    return store.commit(folder, {"step": step, "best": best})


def test_checkpoints_are_listed_verified_and_pruned(run, capsys):
    for step in (2, 4, 6):
        save(run, step, best={"step": 2})
    (save(run, 8, best={"step": 2}) / "weights").write_text("1234567")  # torn
    assert manage.checkpoints([str(run), "--verify", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(row["step"], row["committed"], row["best"]) for row in rows] == [
        (2, True, True),
        (4, True, False),
        (6, True, False),
        (8, False, False),
    ]
    (run / "checkpoints" / store.tag(4) / "weights").write_text("54321")  # same size, other bytes
    assert manage.checkpoints([str(run), "--verify"]) == 1
    printed = capsys.readouterr().out
    assert "damaged: weights" in printed
    assert "incomplete, not usable" in printed
    assert manage.checkpoints([str(run), "--prune", "1"]) == 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [store.tag(2), store.tag(6)]
    with pytest.raises(UserError, match="at least one"):
        manage.checkpoints([str(run), "--prune", "0"])


def test_one_checkpoint_is_the_best(run, capsys):
    """Each of these was the best so far when it was saved."""
    for step in (2, 4, 6):
        save(run, step, best={"step": min(step, 4)})
    manage.checkpoints([str(run), "--json"])
    assert [row["best"] for row in json.loads(capsys.readouterr().out)["checkpoints"]] == [False, True, False]


def test_checkpoints_of_a_running_run_are_not_pruned(run):
    save(run, 2)
    descriptor = records.acquire_lock(run)
    with pytest.raises(UserError, match="is running here"):
        manage.checkpoints([str(run), "--prune", "1"])
    os.close(descriptor)


def test_a_sweep_is_no_run_but_can_be_cancelled(tmp_path, capsys):
    sweep = write_sweep_directory(tmp_path / "sweep", [{"name": "a", "values": {}, "status": "preempted"}])
    assert cli.main(["status", str(sweep)]) == 2
    assert f"`dstune runs {sweep}` lists its trials" in capsys.readouterr().err
    assert cli.main(["cancel", str(sweep)]) == 0
    assert "is not running (1 preempted)" in capsys.readouterr().out
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(sweep)], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        started = psutil.Process(process.pid).create_time()
        record = {"id": "x", "pid": process.pid, "started": started, "host": socket.gethostname(), "processes": 2}
        (sweep / "launch.json").write_text(json.dumps(record))
        waiting = threading.Thread(target=process.wait)
        waiting.start()
        assert cli.main(["cancel", str(sweep), "--json"]) == 0
        waiting.join()
        assert process.returncode == 11
        assert json.loads(capsys.readouterr().out) == {"sweep": str(sweep), "trials": {"preempted": 1}}
    finally:
        process.kill()
