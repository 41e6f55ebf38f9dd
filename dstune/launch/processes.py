"""Finds and ends every process of a launch; its guard does so when the launcher itself is killed.

A rank may leave more processes behind than its children: `datasets` workers, W&B's service, anything that called `setsid` or
whose parent has ended. All of them have inherited the launch's mark in their environment, or a rank's session. A search by
parentage alone would miss orphans, so both of these are searched.

The guard runs this file by its path, so the file imports only the standard library and psutil.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

import psutil

MARK = "DSTUNE_LAUNCH_ID"  # `dstune.core.rank_env.LAUNCH_ID`, which the guard cannot import


def process_namespace() -> str:
    """Return an identifier of this boot and container: process ids can only be compared where it is the same."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex  # equals no other


def processes_of(launch_id: str, sessions: Iterable[int] = ()) -> list[psutil.Process]:
    """Return live processes that carry the launch's mark, belong to one of `sessions` or descend from such a process."""
    sessions = set(sessions)
    process_by_pid: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        if process.pid == os.getpid() or process.pid in process_by_pid or not _belongs(process, launch_id, sessions):
            continue
        for member in (process, *_descendants(process)):
            process_by_pid.setdefault(member.pid, member)
    return list(process_by_pid.values())


def _belongs(process: psutil.Process, launch_id: str, sessions: set[int]) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return os.getsid(process.pid) in sessions or process.environ().get(MARK) == launch_id
    except (psutil.Error, OSError):  # ended meanwhile, or another user's
        return False


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [child for child in process.children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    except psutil.Error:
        return []


def end_all(launch_id: str, sessions: Iterable[int] = (), *, polite_seconds: float = 0.0, patience: float = 5.0) -> int:
    """End every process of the launch with SIGKILL; if `polite_seconds` is given, after SIGTERM and that much time.

    Searches repeatedly until no process is left, since a process may fork during the search. Returns how many are left after
    `patience` seconds (a process stuck in the kernel cannot be killed).
    """
    sessions = list(sessions)
    if polite_seconds > 0:
        remaining = processes_of(launch_id, sessions)
        _signal(remaining, signal.SIGTERM)
        deadline = time.monotonic() + polite_seconds
        while remaining and time.monotonic() < deadline:
            time.sleep(0.05)
            remaining = [process for process in remaining if _is_alive(process)]
    deadline = time.monotonic() + patience
    while remaining := processes_of(launch_id, sessions):
        if time.monotonic() > deadline:
            return len(remaining)
        _signal(remaining, signal.SIGKILL)
        time.sleep(0.02)
    return 0


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def is_stopped(pid: int) -> bool:
    """Return whether SIGSTOP or a debugger has suspended the process."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.Error:
        return False


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):  # also raised when the pid belongs to a newer process by now
            process.send_signal(number)


class Guard:
    """A process that ends all ranks when the launcher (the process that created this object) dies, even by SIGKILL.

    It waits for the end of its standard input, whose other end only the launcher holds. It keeps the descriptors `keep_open`
    open; if the lock of the run directory is among them, the directory stays locked until the last rank of a killed launcher has
    ended. The launcher leaves the context once all ranks have ended, which ends the guard too.
    """

    def __init__(self, launch_id: str, keep_open: Iterable[int] = ()):
        self._process = subprocess.Popen(
            [sys.executable, __file__, launch_id],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=tuple(keep_open),
            start_new_session=True,  # a signal to the launcher's process group must not end the guard too
            bufsize=0,
        )

    def watch(self, session: int) -> None:
        """Tell the guard the session (pid) of a rank."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the guard was killed, and the launcher works without it
            self._process.stdin.write(f"{session}\n".encode())

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _guard(launch_id: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sessions = [int(line) for line in sys.stdin]
    end_all(launch_id, sessions, patience=30.0)


if __name__ == "__main__":
    _guard(sys.argv[1])
