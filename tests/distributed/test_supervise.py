"""Supervision with real processes: deaths, signals, orphans, logs and exit codes."""

import os
import pty
import signal
import subprocess
import time

import psutil
import pytest

from tests.support.launches import Launch, wait_for

# A rank that behaves like the worker: a first SIGTERM saves and exits 75, a second one ends at once.
PATIENT = """
received = []
def stop(number, frame):
    received.append(number)
    note("signals", len(received))
signal.signal(signal.SIGTERM, stop)
note("ready", os.getpid())
while not received:
    time.sleep(0.02)
time.sleep(0.5)
note("final", len(received))
if rank == 0:
    result("preempted")
sys.exit(75)
"""

# A rank that hangs for good and leaves a worker, one in a session of its own whose parent is gone, and an orphan that
# lost the launch's mark but not the rank's session.
HANGING = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = "import time, signal; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
sleeper = [sys.executable, "-c", code, str(run_dir)]
subprocess.Popen(sleeper)
subprocess.run(["setsid", "--fork", *sleeper], check=True)
subprocess.run(["sh", "-c", 'env -u DSTUNE_LAUNCH_ID "$@" &', "sh", *sleeper], check=True)
for line in range(30):
    print(f"line {line} of rank {rank}")
note("ready", os.getpid())
time.sleep(600)
"""


def test_one_rank_killed_ends_the_run_within_ten_seconds(tmp_path):
    launch = Launch(tmp_path / "run", HANGING, ranks=3)
    pids = [int(launch.note("ready", rank)) for rank in range(3)]
    assert len(launch.survivors()) >= 13  # launcher, three ranks and their nine sleepers
    killed = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    assert launch.finish() == 1
    assert time.monotonic() - killed < 10
    assert launch.survivors() == []
    stderr = launch.stderr()
    assert "rank 1 was killed by SIGKILL" in stderr
    assert "line 29 of rank 1" in stderr
    assert "line 10 of rank 1" in stderr
    assert "line 9 of rank 1" not in stderr
    assert "of rank 0" not in stderr
    result = launch.result()
    assert result["status"] == "failed"
    assert "SIGKILL" in result["reason"]
    assert result["world_size"] == 3


def test_one_rank_failing_shows_its_traceback_not_that_of_its_victims(tmp_path):
    script = """
note("ready")
if rank == 1:
    time.sleep(0.5)
    raise RuntimeError("the real cause")
try:
    time.sleep(600)
finally:
    print("consequence")
"""
    launch = Launch(tmp_path / "run", script)
    assert launch.finish() == 1
    assert "rank 1 ended with exit code 1" in launch.stderr()
    assert "RuntimeError: the real cause" in launch.stderr()
    assert "consequence" not in launch.stderr()
    assert launch.survivors() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_forwarded_once_and_ends_with_75(tmp_path, number):
    launch = Launch(tmp_path / "run", PATIENT)
    launch.note("ready", 0), launch.note("ready", 1)
    launch.process.send_signal(number)
    assert launch.finish() == 75
    assert [launch.note("final", rank) for rank in (0, 1)] == ["1", "1"]
    assert f"received {number.name}: saving at the end of this step" in launch.stderr()
    assert launch.result()["status"] == "preempted"
    assert launch.survivors() == []


def test_ctrl_c_of_a_terminal_does_not_reach_the_ranks(tmp_path):
    launch = Launch(tmp_path / "run", PATIENT.replace("signal.SIGTERM, stop", "signal.SIGINT, stop"))
    pids = [int(launch.note("ready", rank)) for rank in (0, 1)]
    assert {os.getsid(pid) for pid in pids} == set(pids)
    os.killpg(launch.process.pid, signal.SIGINT)  # what a terminal does; here SIGTERM then kills the ranks
    assert launch.finish() == 75
    assert not list(launch.run_dir.glob("note-signals-*"))


def test_the_doubled_signal_of_timeout_counts_once(tmp_path):
    launch = Launch(tmp_path / "run", PATIENT)
    launch.note("ready", 0), launch.note("ready", 1)
    for _ in range(2):
        launch.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert launch.finish() == 75
    assert launch.note("final", 0) == "1"


def test_a_second_signal_ends_at_once(tmp_path):
    launch = Launch(tmp_path / "run", HANGING, grace=8.0)
    launch.note("ready", 0), launch.note("ready", 1)
    launch.process.send_signal(signal.SIGINT)
    wait_for(lambda: "saving at the end of this step" in launch.stderr(), "the first signal to be noticed")
    time.sleep(0.5)
    assert launch.process.poll() is None
    sent = time.monotonic()
    launch.process.send_signal(signal.SIGINT)
    assert launch.finish() == 1
    assert time.monotonic() - sent < 3
    assert launch.survivors() == []
    assert "second signal" in launch.result()["reason"]


def test_a_signal_while_ranks_start_ends_all_of_them_with_75(tmp_path):
    # Rank 1 has no handler yet, so SIGTERM kills it; rank 0 waits for it and has to be ended.
    script = """
if rank == 0:
    signal.signal(signal.SIGTERM, lambda number, frame: None)
note("ready")
time.sleep(600)
"""
    launch = Launch(tmp_path / "run", script, grace=0.5)
    launch.note("ready", 0), launch.note("ready", 1)
    launch.process.send_signal(signal.SIGTERM)
    assert launch.finish() == 75
    assert launch.result()["status"] == "preempted"
    assert launch.survivors() == []


@pytest.mark.parametrize("victim", ["launcher", "launcher and guard"])
def test_ranks_end_when_the_launcher_is_killed(tmp_path, victim):
    script = HANGING if victim == "launcher" else "note('ready')\ntime.sleep(600)\n"
    launch = Launch(tmp_path / "run", script)
    launch.note("ready", 0), launch.note("ready", 1)
    guards = [p for p in psutil.Process(launch.process.pid).children() if "processes.py" in " ".join(p.cmdline())]
    assert len(guards) == 1
    if victim != "launcher":  # the kernel's parent-death signal alone
        guards[0].kill()
    launch.process.kill()
    launch.process.wait()
    wait_for(lambda: not launch.survivors(), "the ranks to end", timeout=10.0)
    wait_for(lambda: not guards[0].is_running(), "the guard to end", timeout=10.0)


def test_a_run_directory_in_use_is_refused_and_free_after_a_kill(tmp_path):
    first = Launch(tmp_path / "run", PATIENT)
    first.note("ready", 0), first.note("ready", 1)
    second = Launch(tmp_path / "run", PATIENT)
    assert second.finish() == 2
    assert f"process {first.process.pid}" in second.stderr()
    assert "dstune cancel" in second.stderr()
    assert first.process.poll() is None
    first.process.kill()
    first.process.wait()
    for note in first.run_dir.glob("note-*"):
        note.unlink()
    third = Launch(tmp_path / "run", PATIENT)  # waits for the guard of the killed one, then starts
    third.note("ready", 0), third.note("ready", 1)
    third.process.send_signal(signal.SIGTERM)
    assert third.finish() == 75


def test_the_directory_stays_locked_until_the_ranks_of_a_killed_launcher_are_gone(tmp_path):
    launch = Launch(tmp_path / "run", HANGING)
    launch.note("ready", 0), launch.note("ready", 1)
    (guard,) = [p for p in psutil.Process(launch.process.pid).children() if "processes.py" in " ".join(p.cmdline())]
    guard.suspend()
    launch.process.kill()
    launch.process.wait()
    assert launch.survivors()  # the sleepers, which the guard has yet to end
    again = Launch(launch.run_dir, "result('completed')\n")
    time.sleep(2)
    assert again.process.poll() is None
    assert again.stderr() == ""
    guard.resume()
    assert again.finish() == 0
    assert launch.survivors() == []


def test_what_outlives_ranks_that_completed_is_terminated_and_then_killed(tmp_path):
    script = """
polite = "import pathlib, sys; pathlib.Path(sys.argv[1], 'note-asked-0').touch(); sys.exit()"
for action in (polite, "pass"):
    code = f"import signal, time\\ndef on_term(*_):\\n    {action}\\nsignal.signal(15, on_term)\\ntime.sleep(600)"
    subprocess.run(["setsid", "--fork", sys.executable, "-c", code, str(run_dir)], check=True)
time.sleep(0.5)
result("completed")
"""
    launch = Launch(tmp_path / "run", script, ranks=1)
    assert launch.finish() == 0
    assert (launch.run_dir / "note-asked-0").exists()
    assert launch.survivors() == []


def test_a_users_mistake_in_a_rank_is_reported_as_such(tmp_path):
    script = """
from dstune.core.errors import Problem, UserError, to_json
if rank == 0:
    error = UserError([Problem("data.jsonl:17", "no text", "mend it"), Problem("data.jsonl:18", "no label")])
    (run_dir / "logs" / "rank-0.error").write_text(to_json(error))
    time.sleep(0.3)
    sys.exit(2)
while not (run_dir / "logs" / "rank-0.error").exists():
    time.sleep(0.01)
sys.exit(1)  # the consequence is seen before the cause
"""
    launch = Launch(tmp_path / "run", script)
    assert launch.finish() == 2
    assert "data.jsonl:17: no text" in launch.stderr()
    assert "data.jsonl:18: no label" in launch.stderr()
    assert "last lines" not in launch.stderr()
    assert launch.result()["status"] == "failed"
    # The next launch must not take the old error for its own.
    again = Launch(launch.run_dir, "result('completed')\n")
    assert again.finish() == 0
    assert not list((launch.run_dir / "logs").glob("*.error"))


def test_a_failure_that_the_worker_reports_keeps_its_result(tmp_path):
    script = """
from dstune.core.errors import TrainingFailed
from dstune.core.rank_errors import leave_error
if rank == 0:
    result("failed")
    leave_error(run_dir, 0, TrainingFailed("loss was not finite in 10 steps"))  # whole, before the other one looks
else:  # all ranks come to this end together
    while not (run_dir / "logs" / "rank-0.error").exists():
        time.sleep(0.01)
sys.exit(1)
"""
    launch = Launch(tmp_path / "run", script)
    assert launch.finish() == 1
    assert "dstune: loss was not finite in 10 steps" in launch.stderr()
    assert launch.result() == {"status": "failed", "reason": "", "steps": 3}


def test_ranks_that_leave_no_result_failed(tmp_path):
    run_dir = tmp_path / "run"
    assert Launch(run_dir, "result('completed')\n").finish() == 0
    silent = Launch(run_dir, "print('done')\n")
    assert silent.finish() == 1  # the old result.json does not count
    assert silent.result()["reason"] == "the ranks ended without a result"


def test_numbers_of_a_failed_run_come_from_its_metrics(tmp_path):
    script = """
if rank == 0:
    rows = [{"step": 7, "loss": 1.5, "tokens": 700, "tokens_per_second": 9.5}, {"step": 7, "eval/loss": 2.0}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows) + '{"step": 8, "lo')
os.kill(os.getpid(), signal.SIGSEGV)
"""
    launch = Launch(tmp_path / "run", script, ranks=1)
    assert launch.finish() == 1
    assert "SIGSEGV" in launch.stderr()
    result = launch.result()
    assert (result["steps"], result["tokens"], result["tokens_per_second"]) == (7, 700, 9.5)


PROGRESS = """
if rank == 0:
    out = sys.stdout
    out.write("plain line\\n"); out.flush()
    out.write("1/9 transient\\r"); out.flush(); time.sleep(0.05)
    out.write("2/9 tran"); out.flush(); time.sleep(0.05)
    out.write("sient\\r"); out.flush()
    out.write("last line\\r\\nunfinished"); out.flush()
    print("to stderr", file=sys.stderr)
    result("completed")
note("console", os.environ["DSTUNE_CONSOLE"])
"""


def test_transient_lines_stay_out_of_pipes_and_logs(tmp_path):
    launch = Launch(tmp_path / "run", PROGRESS)
    assert launch.finish() == 0
    assert launch.stdout == b"plain line\nlast line\r\nunfinished\n"
    log = (launch.run_dir / "logs" / "rank-0.log").read_text()
    assert "transient" not in log
    assert "plain line\nlast line" in log.replace("to stderr\n", "")
    assert "to stderr" in log
    assert launch.note("console", 0) == "plain"


def test_transient_lines_reach_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # of another terminal: whoever runs the tests may have exported it
    screen, terminal = pty.openpty()
    subprocess.run(["stty", "cols", "77", "-onlcr"], stdin=terminal, check=True)
    launch = Launch(tmp_path / "run", PROGRESS, stdout=terminal)
    os.close(terminal)
    displayed = b""
    try:
        while data := os.read(screen, 4096):
            displayed += data
    except OSError:  # EIO: the last writer has closed the terminal
        pass
    assert launch.finish() == 0
    assert b"1/9 transient\r2/9 transient\r" in displayed
    blank = b" " * len("2/9 transient") + b"\r"
    assert displayed.endswith(b"2/9 transient\r" + blank + b"last line\r\nunfinished\n")
    assert "transient" not in (launch.run_dir / "logs" / "rank-0.log").read_text()
    assert launch.note("console", 0) == "tty:77"


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    script = """
note("ready")
for line in range(200):
    print("x" * 1000)
    time.sleep(0.002)
if rank == 0:
    result("completed")
"""
    launch = Launch(tmp_path / "run", script)
    launch.note("ready", 0)
    launch.process.stdout.close()
    assert launch.process.wait(timeout=20) == 0


def test_logs_of_a_resumed_run_are_continued(tmp_path):
    for attempt in range(2):
        assert Launch(tmp_path / "run", f"print('attempt {attempt} of rank', rank)\nresult('completed')").finish() == 0
    for rank in (0, 1):
        lines = (tmp_path / "run" / "logs" / f"rank-{rank}.log").read_text().splitlines()
        assert [line for line in lines if not line.startswith("===")] == [f"attempt {n} of rank {rank}" for n in (0, 1)]
        assert [line.split(" on ")[0] for line in lines if line.startswith("===")] == [f"=== rank {rank} of 2"] * 2
