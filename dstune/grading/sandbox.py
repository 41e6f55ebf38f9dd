"""A sandbox for Python programs that a stranger, or the model, has written.

A program sees an empty file system with the interpreter and the system's libraries, read-only. It has no network, sees no process
but its own, and gets none of the user's environment variables. Time, memory, processes, files and output are limited; when its
time is over, everything that it has started is killed. The kernel refuses system calls that no such program needs
(`system_calls.py`).

The sandbox needs Linux 5.12 and the right to make user namespaces (`sandbox_child.py`). Without these, features that run programs
are refused.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path

from dstune.grading.sandbox_child import OUT_OF_TIME, UNFILTERED

log = logging.getLogger(__name__)

CHILD = Path(__file__).with_name("sandbox_child.py")
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
"""Paths of the machine that a program may read, besides the interpreter."""
START_SECONDS = 10.0
"""Time to build the sandbox, in addition to the program's own time."""
AT_ONCE = 4
"""Number of programs that rewards run at the same time."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Limits:
    """Limits of one program. Graders in OpenAI's API have 120 s, 2 GB of memory and 1 GB of files."""

    seconds: float = 120.0
    """Wall-clock time of the program, and about the CPU time of each of its processes."""
    memory_bytes: int = 2 * 2**30
    """Address space of each process."""
    disk_bytes: int = 2**28
    """All files together; they are in memory."""
    processes: int = 16
    """Processes and threads."""
    output_bytes: int = 2**20
    """Standard output."""


@dataclass(frozen=True)
class Outcome:
    """What a program printed, and how it ended."""

    output: str
    error: str
    """The last 4,096 bytes of its standard error."""
    failure: str
    """Why the program was stopped, or the error that it ended with; empty if it succeeded."""
    is_out_of_time: bool = False


def run_program(source: str, stdin: str, limits: Limits) -> Outcome:
    """Run the Python program `source` with `stdin` as its standard input.

    Raises:
        RuntimeError: there is no sandbox on this machine.
    """
    with (
        tempfile.TemporaryDirectory(prefix="dstune-sandbox-") as root,
        tempfile.TemporaryFile() as errors,
        _pipe() as (reading, writing),
    ):
        values = asdict(limits) | {"root": root, "paths": SYSTEM, "cpu_seconds": int(limits.seconds) + 1}
        process = subprocess.Popen(
            [sys.executable, "-I", str(CHILD), json.dumps(values | {"stands": writing.fileno()})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd="/",
            env=ONE_THREAD,
            start_new_session=True,
            pass_fds=[writing.fileno()],
        )
        writing.close()
        try:
            output, failure = _collect_output(process, json.dumps({"source": source, "stdin": stdin}).encode(), limits)
        finally:
            _end(process)
        size = errors.seek(0, os.SEEK_END)
        errors.seek(max(0, size - 4096))
        error = errors.read().decode(errors="replace").strip()
        stands = select.select([reading], [], [], 0)[0] and reading.read(1)
    if not stands:
        raise RuntimeError(error or failure or f"its first process ended with exit code {process.returncode}")
    if stands == UNFILTERED:
        _warn_of_missing_filter()
    too_long = f"it took longer than {limits.seconds:g} s"
    if not failure and process.returncode:
        failure = too_long if process.returncode == OUT_OF_TIME else _failure(process.returncode, error)
    return Outcome(output.decode(errors="replace"), error, failure, failure == too_long)


@contextmanager
def _pipe() -> Iterator[tuple[FileIO, FileIO]]:
    """Yield the end of a pipe to read from and its end to write to."""
    reading, writing = os.pipe()
    with FileIO(reading, "r") as reader, FileIO(writing, "w") as writer:
        yield reader, writer


@functools.cache
def _warn_of_missing_filter() -> None:
    log.warning(
        "this kernel, or processor, has no filter of system calls (seccomp): the namespaces of the sandbox alone keep programs in"
    )


def _failure(code: int, error: str) -> str:
    """Return why a program ended with the exit code `code`. error: its standard error."""
    if code > 128:
        name = signal.Signals(code - 128).name if code - 128 in set(signal.Signals) else f"signal {code - 128}"
        return f"it was ended by {name}, as for too much processor time, memory or output"
    return error.splitlines()[-1][:500] if error else f"it ended with exit code {code}"


@functools.cache
def missing_reason() -> str:
    """Return why this machine has no sandbox; empty if it has one. Runs a program to find out, once."""
    if sys.platform != "linux":
        return "it needs Linux"
    try:
        outcome = run_program("print('inside')", "", Limits(seconds=20))
    except RuntimeError as error:
        return f"this machine gives programs no namespaces of their own: {error}"
    return "" if outcome.output == "inside\n" else f"a program cannot be started in it: {outcome.failure}"


def _collect_output(process: subprocess.Popen[bytes], request: bytes, limits: Limits) -> tuple[bytes, str]:
    """Return what the program printed, and the limit that it exceeded (empty if none). The caller ends the process.

    request: the program and its input, as JSON.
    """
    assert process.stdin is not None and process.stdout is not None
    deadline = time.monotonic() + limits.seconds + START_SECONDS
    # Writing cannot block for long: the child reads the complete request before it runs anything.
    with suppress(BrokenPipeError):
        process.stdin.write(request)
    with suppress(BrokenPipeError):
        process.stdin.close()
    output = b""
    while True:
        seconds_left = deadline - time.monotonic()
        if seconds_left <= 0 or not select.select([process.stdout], [], [], seconds_left)[0]:
            return output, f"it took longer than {limits.seconds:g} s"
        part = os.read(process.stdout.fileno(), 2**16)
        if not part:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
                return output, ""
            return output, f"it took longer than {limits.seconds:g} s"
        output += part
        if len(output) > limits.output_bytes:
            return output[: limits.output_bytes], f"it printed more than {limits.output_bytes:,} bytes"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the sandbox with everything in it, and close its pipes."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError, AttributeError):
            pipe.close()  # type: ignore[union-attr]
