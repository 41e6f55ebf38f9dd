"""Trials as processes: order, failures, what is skipped and continued, slots, signals."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dstune.core.errors import UserError
from dstune.launch import records
from dstune.launch.console import Console
from dstune.sweep.devices import Slot
from dstune.tracking.trials import Record, read_records
from tests.support.sweeps import Scripted

RATES = "optimizer.lr=1,2,3"


def statuses(path: Path) -> dict[str, str]:
    return {one.name: one.status for one in read_records(path)}


def test_all_trials_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sweep = Scripted(tmp_path, "time.sleep(0.1); done(float(value) / 2)", monkeypatch)
    sweep.run(RATES)
    assert statuses(sweep.path) == {"lr=1": "completed", "lr=2": "completed", "lr=3": "completed"}
    assert [one.objective for one in read_records(sweep.path)] == [{"loss": 0.5}, {"loss": 1.0}, {"loss": 1.5}]
    began = [float(sweep.starts(f"lr={value}")[0].split()[0]) for value in (1, 2, 3)]
    assert began == sorted(began)
    assert all(later - earlier >= 0.1 for earlier, later in itertools.pairwise(began))


def test_a_failed_trial_is_recorded_and_the_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = """
if value == "1":
    print("dstune: optimizer.lr=1: too large"); print("    fix: optimizer.lr=0.1"); sys.exit(2)
if value == "2":
    result("failed", "rank 0 was killed by SIGKILL"); sys.exit(1)
done(1.0)
"""
    sweep = Scripted(tmp_path, script, monkeypatch)
    sweep.run(RATES)
    first, second, third = read_records(sweep.path)
    assert (first.status, first.reason) == ("failed", "optimizer.lr=1: too large\n    fix: optimizer.lr=0.1")
    assert (second.status, second.reason) == ("failed", "rank 0 was killed by SIGKILL")
    assert third.status == "completed"


def test_the_same_sweep_again_skips_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = "\nif value == '2' and starts.read_text().count('\\n') == 1: result('preempted'); sys.exit(75)\ndone(1.0)"
    sweep = Scripted(tmp_path, script, monkeypatch)
    sweep.run(RATES)
    assert statuses(sweep.path)["lr=2"] == "preempted"
    grid = sweep.run(RATES)
    assert [trial.name for trial in grid.finished] == ["lr=1", "lr=3"]
    assert {name: len(sweep.starts(name)) for name in ("lr=1", "lr=2", "lr=3")} == {"lr=1": 1, "lr=2": 2, "lr=3": 1}
    assert set(statuses(sweep.path).values()) == {"completed"}
    (second,) = [one for one in read_records(sweep.path) if one.name == "lr=2"]
    assert second.starts == 2
    sweep.run("optimizer.lr=0,1,2,3")
    assert len(sweep.starts("lr=0")) == 1
    assert [one.number for one in read_records(sweep.path)] == [0, 1, 2, 3], "a value in front moves the others on"
    sweep.run(RATES, again=True)
    assert len(sweep.starts("lr=1")) == 2, "runs that became longer start again"


def test_a_trial_whose_end_nobody_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sweep = Scripted(tmp_path, "done(1.0)", monkeypatch)
    outcome = {"status": "completed", "eval_final": {"loss": 4.0}, "seconds": 31.24}
    records.write_json(_made(sweep.path / "lr=1") / "result.json", outcome)
    sweep.run("optimizer.lr=1,2")
    assert not sweep.starts("lr=1")
    first, second = read_records(sweep.path)
    assert first == Record("lr=1", 0, {"optimizer.lr": 1}, status="completed", objective={"loss": 4.0}, seconds=31.2)
    assert second.objective == {"loss": 1.0}


def test_a_trial_that_failed_and_was_continued_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its time is that of all its launches, and why the first one failed is no longer true."""
    sweep = Scripted(tmp_path, "result('failed', 'rank 0 was killed by SIGKILL'); sys.exit(1)", monkeypatch)
    sweep.run("optimizer.lr=1,2")
    result = {"status": "completed", "reason": "", "eval_final": {"loss": 4.0}, "seconds": 100.0}
    records.write_json(sweep.path / "lr=1" / "result.json", result)
    sweep.run("optimizer.lr=1,2")
    trial, _ = read_records(sweep.path)
    assert (trial.status, trial.reason, trial.objective, trial.seconds) == ("completed", "", {"loss": 4.0}, 100.0)


def test_a_trial_of_a_killed_sweep_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sweep = Scripted(tmp_path, "done(1.0)", monkeypatch)
    hold = f"run = Path({str(_made(sweep.path / 'lr=1'))!r}); lock = records.acquire_lock(run)"
    begin = f"{hold}; records.begin(run, 'x', 1); print(flush=True); time.sleep(2)"
    program = f"import time; from pathlib import Path; from dstune.launch import records; {begin}"
    saving = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert saving.stdout is not None and saving.stdout.readline()
    sweep.run("optimizer.lr=1,2")
    assert saving.poll() is not None, "the trial began before its earlier process had ended"
    assert statuses(sweep.path) == {"lr=1": "completed", "lr=2": "completed"}
    saving.stdout.close()


def test_a_request_to_stop_while_waiting_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The launch that is waited for still has the directory."""
    sweep = Scripted(tmp_path, "done(1.0)", monkeypatch)
    hold = f"run = Path({str(_made(sweep.path / 'lr=1'))!r}); lock = records.acquire_lock(run)"
    begin = f"{hold}; records.begin(run, 'x', 1); print(flush=True); time.sleep(60)"
    program = f"import time; from pathlib import Path; from dstune.launch import records; {begin}"
    saving = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert saving.stdout is not None and saving.stdout.readline()
    threading.Timer(0.3, lambda: sweep.received.append("SIGINT")).start()
    sweep.run("optimizer.lr=1,2")
    assert saving.poll() is None
    assert not sweep.starts("lr=1") and not sweep.starts("lr=2")
    saving.kill()
    saving.wait()
    saving.stdout.close()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_slots_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sweep = Scripted(tmp_path, "time.sleep(0.4); done(1.0)", monkeypatch)
    slots = [Slot("a", {"SLOT": "a"}, (0,)), Slot("b", {"SLOT": "b"}, (0, 1))]
    sweep.run("optimizer.lr=1,2,3,4", slots=slots)
    lines = [sweep.starts(f"lr={value}")[0].split() for value in (1, 2, 3, 4)]
    assert [line[2] for line in lines[:2]] == ["a", "b"]
    assert sorted(line[2] for line in lines) == ["a", "a", "b", "b"]
    assert {line[2]: line[1] for line in lines} == {"a": "0", "b": "0,1"}
    assert float(lines[1][0]) - float(lines[0][0]) < 0.4, "the first two run at the same time"
    assert float(lines[2][0]) - float(lines[0][0]) >= 0.4, "the third waits for a slot"


def test_a_request_to_stop_reaches_all_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = """
while not asked: time.sleep(0.02)
result("preempted", "received SIGTERM: saved at step 3"); sys.exit(75)
"""
    sweep = Scripted(tmp_path, script, monkeypatch)
    threading.Thread(target=_stop_once_begun, args=(sweep, "lr=2")).start()
    sweep.run(RATES, slots=[Slot("a"), Slot("b")])
    assert statuses(sweep.path) == {"lr=1": "preempted", "lr=2": "preempted"}, "the third never starts"
    assert not sweep.starts("lr=3")


def _stop_once_begun(sweep: Scripted, name: str) -> None:
    deadline = time.monotonic() + 20
    while not sweep.starts(name) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)  # its handlers are set by then
    sweep.received.append("SIGINT")


def test_a_second_signal_is_passed_on_as_a_second_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = """
while len(asked) < 2: time.sleep(0.02)
result("failed", "stopped at once by a second signal: " + " ".join(signal.Signals(n).name for n in asked)); sys.exit(1)
"""
    sweep = Scripted(tmp_path, script, monkeypatch)

    def twice() -> None:
        _stop_once_begun(sweep, "lr=1")
        time.sleep(0.2)
        sweep.received.append("SIGINT")

    threading.Thread(target=twice).start()
    sweep.run("optimizer.lr=1,2")
    (only,) = read_records(sweep.path)
    assert only.reason == "stopped at once by a second signal: SIGTERM SIGINT"


def test_what_follows_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sweep = Scripted(tmp_path, "(run_dir / 'words').write_text(' '.join(sys.argv[3:])); done(1.0)", monkeypatch)
    sweep.run("optimizer.lr=1,2", "method=full,lora")
    path = sweep.path / "lr=1,method=lora"
    words = (path / "words").read_text()
    assert words == f"trainer.seed=7 optimizer.lr=1 method=lora run.dir='{path}' run.name='lr=1,method=lora'"


def test_a_sweep_in_a_place_that_takes_only_whole_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from types import SimpleNamespace

    from dstune.sweep import command

    monkeypatch.setattr(command, "refused_operations", lambda path: {"lock": "no", "append": "no", "sync": "no"})
    with pytest.raises(UserError, match=r"(?s)sweep\.dir.*the place refuses append, lock"):
        command.run(SimpleNamespace(path=tmp_path / "sweep"), [], False, Console())
    assert not (tmp_path / "sweep").exists()
