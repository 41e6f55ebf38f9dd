"""Forked commands are what started ones are: children with their own command line, environment, folder, signals and exit code."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support import warm_start
from support.command import clean_environment, wait_until
from support.warm_start import Popen, program, run, same_imports

SCRIPT = Path(__file__).parents[1] / "support" / "what_i_am.py"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return clean_environment(tmp_path) | {"DSTUNE_SIGN": "seen", "HF_HUB_OFFLINE": "1"}


def started(tmp_path: Path, env: dict[str, str], *words: str, **options) -> subprocess.Popen:
    return Popen([sys.executable, str(SCRIPT), *words], cwd=tmp_path, env=env, text=True, **options)


@pytest.mark.parametrize("cold", [False, True])
def test_a_fork_is_what_a_started_process_is(tmp_path: Path, env: dict[str, str], cold: bool) -> None:
    if cold:
        warm_start.cold.set()
    read, write = os.pipe()
    with started(tmp_path, env, "wait", stdout=subprocess.PIPE, pass_fds=[write], start_new_session=True) as process:
        os.close(write)
        line = process.stdout.readline().split("|")
        found = psutil.Process(process.pid)
        assert line[:3] == [str(os.getpid()), str(tmp_path), "seen"] and line[3] == str(process.pid)
        assert (line[4].strip() == "warm") is not cold
        assert found.ppid() == os.getpid() and os.getsid(process.pid) == process.pid
        assert (
            list(filter(None, found.cmdline()))[-2:] == [str(SCRIPT), "wait"]
            and found.environ()["DSTUNE_SIGN"] == "seen"
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == -signal.SIGTERM
    assert os.read(read, 1) == b"", "somebody else holds a descriptor that was given to the process"
    os.close(read)


def test_what_a_test_imports_does_not_let_later_ones_start_cold(tmp_path, env, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_OF_AN_IMPORT", "1")
    monkeypatch.setattr(warm_start, "source", None)
    with started(tmp_path, env, "wait", stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().strip().endswith("warm")
        process.kill()


@pytest.mark.parametrize(("words", "code", "text"), [(["exit"], 7, "out"), (["raise"], 1, "Traceback")])
def test_its_exit_code_and_what_it_writes(tmp_path, env, words, code, text) -> None:
    done = run([sys.executable, str(SCRIPT), *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and text in done.stdout + done.stderr


def test_a_launcher_that_is_killed_takes_the_twin_along(tmp_path: Path, env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "dstune", "doctor"]
    with Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        twins = wait_until(lambda: psutil.Process(process.pid).children())
        wait_until(lambda: warm_start.__file__ in twins[0].cmdline())
        process.kill()
    wait_until(
        lambda: all(not twin.is_running() or twin.status() == psutil.STATUS_ZOMBIE for twin in twins), timeout=10
    )


def test_it_has_what_a_process_inherits_and_its_output_is_buffered(tmp_path: Path, env: dict[str, str]) -> None:
    """Limits, processors, mask and ignored signals of the asking process, which differ from those of the warm one."""
    script = [sys.executable, str(SCRIPT), "inherit"]
    cores, mask, handler = os.sched_getaffinity(0), os.umask(0o027), signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    try:
        os.sched_setaffinity(0, [min(cores)])
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
        env |= {"TMPDIR": str(tmp_path)}
        env.pop("PYTHONUNBUFFERED", None)
        warm = run(script, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60).stdout
        own = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60).stdout
    finally:
        os.sched_setaffinity(0, cores)
        os.umask(mask)
        signal.signal(signal.SIGUSR1, handler)
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    (said, is_warm), (expected, is_own) = (text.strip().split("\n")[-1].rsplit("|", 1) for text in (warm, own))
    assert (is_warm, is_own) == ("warm", "cold") and said == expected and str(tmp_path) in said


def test_a_start_that_was_interrupted_leaves_none_of_its_answers_behind() -> None:
    one, other = socket.socketpair()
    broken = warm_start.Source(one, {}, frozenset())
    with pytest.raises(TypeError):
        broken.start(["x"], ["no descriptor"])  # type: ignore[list-item]
    other.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        broken.start(["x"], [])


def test_what_could_have_changed_an_import_starts_cold(env: dict[str, str]) -> None:
    base = {"PATH": "/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    assert same_imports(base | {"RANK": "1", "DSTUNE_CACHE": "x"}, base, frozenset())
    for changed in (
        {"HF_HUB_OFFLINE": "0"}, {"LD_PRELOAD": "x.so"}, {"OMP_NUM_THREADS": "2"}, {"MY_OWN": "1"},
        {"PYTHONPATH": "/another/tree"}, {"DSTUNE_FAULT": "disk"},
    ):  # fmt: skip
        assert not same_imports(base | changed, base, frozenset())
    assert not same_imports({"PATH": "/bin"}, base, frozenset())
    assert program([sys.executable, "-m", "dstune", "train"]) and not program([sys.executable, "-c", "import dstune"])
    assert not program(["python3", "-m", "dstune"]) and not program([sys.executable, "-I", "-m", "dstune"])
