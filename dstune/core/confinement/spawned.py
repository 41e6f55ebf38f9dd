"""Runs work in processes that are started for it: they hold nothing of this process's memory or variables, answer one request after
the other, and can be killed.

A process is one of `python -m MODULE`, where MODULE calls `answer_requests`.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import IO, Any

from dstune.core.child_python import child_environment
from dstune.core.confinement import inside
from dstune.core.confinement.system_calls import deny_system_calls
from dstune.core.confinement.table import WALL, Limits

START_SECONDS = 120.0
"""Time for a process to import what it needs."""
IDLE = 2
"""Processes of a pool that wait for the next request; others end when they have answered."""
_PIPE_BYTES = 2**20
_REQUEST = struct.Struct("<dQ")
"""Seconds of processor time (0: not limited), size of the request."""
_ANSWER = struct.Struct("<cQ")
"""Kind, size of the answer."""
_READY, _ANSWERED, _MEMORY = b"r", b"a", b"m"


class ProcessEnded(Exception):
    """The process took too long, needed more memory than it may, answered more, or ended."""


class TookTooLong(ProcessEnded):
    """The process has not answered in time."""


class Spawned:
    """One process that answers requests."""

    def __init__(
        self,
        module: str,
        limits: Limits,
        variables: Mapping[str, str] | None = None,
        stderr: int | IO[bytes] = subprocess.DEVNULL,
        folder: str = "/",
    ):
        """Start the process; `wait_until_ready` before the first request.

        variables: its environment; by default, it has none. folder: its working directory.
        """
        self._limits = limits
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=child_environment(variables or {}),
            cwd=folder,
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._in, self._out = self.process.stdin.fileno(), self.process.stdout.fileno()
        for pipe in (self._in, self._out):
            with suppress(OSError):  # a user may have no more of them
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            os.set_blocking(pipe, False)
        _all.add(self)

    def wait_until_ready(self) -> None:
        """Wait until the process has imported what it needs. Raises ProcessEnded."""
        self._answer(time.monotonic() + START_SECONDS)

    def ask(self, request: bytes, seconds: float = 0.0, wall_seconds: float | None = None) -> bytearray:
        """Return the answer. Raises ProcessEnded; the process has then to be ended.

        seconds: of processor time; 0: not limited. wall_seconds: by default 20 times as many.
        """
        deadline = time.monotonic() + (WALL * seconds if wall_seconds is None else wall_seconds)
        self._write(_REQUEST.pack(seconds, len(request)), deadline)
        self._write(request, deadline)
        return self._answer(deadline)

    def _answer(self, deadline: float) -> bytearray:
        kind, size = _ANSWER.unpack(self._read(_ANSWER.size, deadline))
        if size > self._limits.output_bytes:
            raise ProcessEnded
        answer = self._read(size, deadline)
        if kind == _MEMORY:
            raise ProcessEnded
        return answer

    def _write(self, content: bytes, deadline: float) -> None:
        view = memoryview(content)
        while view:
            self._wait(self._in, select.POLLOUT, deadline)
            try:
                view = view[os.write(self._in, view[:_PIPE_BYTES]) :]
            except BlockingIOError:
                continue
            except OSError:
                raise ProcessEnded from None

    def _read(self, size: int, deadline: float) -> bytearray:
        content, at = bytearray(size), 0
        with memoryview(content) as view:
            while at < size:
                self._wait(self._out, select.POLLIN, deadline)
                read = os.readv(self._out, [view[at:]])
                if not read:
                    raise ProcessEnded
                at += read
        return content

    def _wait(self, pipe: int, event: int, deadline: float) -> None:
        waiting = select.poll()
        waiting.register(pipe, event)
        if not waiting.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TookTooLong

    def end(self, seconds: float = 0.0) -> None:
        """Kill the process, and close its pipes. seconds: for the process to end by itself, after a signal."""
        if seconds:
            self.process.terminate()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.close()

    def close(self) -> None:
        """Close the pipes to the process, which then ends by itself."""
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()


_all: weakref.WeakSet[Spawned] = weakref.WeakSet()


class Pool:
    """Answers requests of any thread, each in a process that answers no other meanwhile."""

    def __init__(self, module: str, limits: Limits):
        self._module, self._limits = module, limits
        self._idle: list[Spawned] = []
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._forget)

    def ask(self, request: bytes, seconds: float, wall_seconds: float | None = None) -> bytearray:
        """Return the answer of a process; see `Spawned.ask`. Raises ProcessEnded: this request ended its process."""
        spawned = self._take()
        try:
            answer = spawned.ask(request, seconds, wall_seconds)
        except BaseException:
            spawned.end()
            raise
        with self._lock:
            if is_kept := len(self._idle) < IDLE:
                self._idle.append(spawned)
        if not is_kept:
            spawned.end()
        return answer

    def _take(self) -> Spawned:
        with self._lock:
            while self._idle:
                spawned = self._idle.pop()
                if spawned.process.poll() is None:
                    return spawned
                spawned.close()
        spawned = Spawned(self._module, self._limits)
        try:
            spawned.wait_until_ready()
        except ProcessEnded:
            spawned.end()
            raise RuntimeError(f"`python -m {self._module}` does not start") from None
        return spawned

    def _forget(self) -> None:
        """Forget, in a fork, the processes of its parent, which would otherwise wait for the fork to end too."""
        self._lock, self._idle = threading.Lock(), []
        for spawned in list(_all):
            spawned.close()
            spawned.process.returncode = 0  # it is no child of this process


def answer_requests(answer: Callable[[bytes], Sequence[Any]], limits: Limits) -> None:
    """Answer the requests of the process that started this one until it ends, within `limits`.

    answer: gets a request, and returns the parts of the answer, bytes or buffers of bytes. A MemoryError of it is an answer too.
    """
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of a library must not mix with the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    inside.set_limits(asdict(limits))
    if limits.is_filtered:
        inside.gain_no_privileges()
        deny_system_calls()
    _send(answers, _READY)
    while head := requests.read(_REQUEST.size):
        seconds, size = _REQUEST.unpack(head)
        request = requests.read(size)
        inside.end_after(seconds)
        try:
            kind, parts = _ANSWERED, answer(request)
        except MemoryError:
            kind, parts = _MEMORY, ()
        inside.end_after(0)
        _send(answers, kind, *parts)
        request, parts = b"", ()


def _send(answers: IO[bytes], kind: bytes, *parts: Any) -> None:
    answers.write(_ANSWER.pack(kind, sum(map(len, parts))))
    for part in parts:
        answers.write(part)
    answers.flush()
