"""A sandbox for Python programs that a stranger, or the model, has written.

A program sees an empty file system with the interpreter and the system's libraries, read-only. It has no network, sees no process
but its own, and gets none of the user's environment variables. Time, memory, processes, files and output are limited; when its
time is over, everything that it has started is killed. The kernel refuses system calls that no such program needs
(`core/confinement/system_calls.py`), and those that hold memory outside of any process: `memfd_create`, System V and shared
anonymous memory, connections that nobody accepts, pages of removed files.

What a program can hold of the machine's memory is the sum of: `memory_bytes` for its processes together (measured every
`MEASURED_SECONDS`), `file_bytes` for its files, the kernel's limit for the pipes of one user (64 MiB by default), and the
buffers of at most `processes` x `descriptors` sockets. Locks of parts of a file take 200 bytes each; they are not limited, but
slow to get: on two cores, 5 MiB a second. Where this process can make control groups, the kernel holds each program to
one sum for all of them.

The sandbox needs Linux 5.12 and the right to make user namespaces (`sandbox_child.py`). Without these, features that run programs
are refused.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from io import FileIO
from pathlib import Path

from dstune.core.confinement import control_group
from dstune.core.confinement.control_group import memory_group
from dstune.core.confinement.table import PROGRAM, Limits
from dstune.grading.sandbox_child import OUT_OF_TIME, UNFILTERED

log = logging.getLogger(__name__)

CHILD = Path(__file__).with_name("sandbox_child.py")
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
"""Paths of the machine that a program may read, besides the interpreter."""
START_SECONDS = 10.0
"""Time to build the sandbox, in addition to the program's own time."""
MEASURED_SECONDS = 0.05
"""Time between two measurements of the memory of a program's processes."""
KERNEL_BYTES = 2**26
"""Memory of the kernel for a program (pipes, sockets, names of files), which its control group counts too."""
LOOKED_AT_BYTES = 2**28
"""Below this much memory, pages that several processes share are not worth a closer look."""
ERROR_BYTES = 4096
"""How much of the end of standard error is reported."""
AT_ONCE = 4
"""Number of programs that rewards run at the same time."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


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

    limits: `replace(PROGRAM, ...)`; `seconds` are of the wall clock.

    Raises:
        RuntimeError: there is no sandbox on this machine.
    """
    assert limits.seconds is not None
    with (
        tempfile.TemporaryDirectory(prefix="dstune-sandbox-") as root,
        _pipe() as (reading, writing),
        memory_group(limits.memory_bytes + limits.file_bytes + KERNEL_BYTES) as group,
    ):
        values = asdict(limits) | {"root": root, "paths": SYSTEM, "cpu_seconds": int(limits.seconds) + 1}
        # Each stream is a pipe: a program can change the flags of its own end, but of a file it would change this process's too.
        process = subprocess.Popen(
            [sys.executable, "-I", str(CHILD), json.dumps(values | {"stands": writing.fileno()})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            env=ONE_THREAD,
            start_new_session=True,
            pass_fds=[writing.fileno()],
        )
        writing.close()
        if group is None:
            _warn_of_missing_group()
        try:
            if group is not None:  # before the process gets its request: until then it starts no other
                group.add(process.pid)
            request = json.dumps({"source": source, "stdin": stdin}).encode()
            output, error_end, failure = _collect_output(process, request, limits)
        finally:
            _end(process)
        if group is not None and group.is_exceeded:
            failure = _too_large(limits)
        error = error_end.decode(errors="replace").strip()
        stands = _is_readable(reading) and reading.read(1)
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


def _is_readable(reading: FileIO) -> bool:
    with selectors.DefaultSelector() as waiting:
        waiting.register(reading, selectors.EVENT_READ)
        return bool(waiting.select(0))


@functools.cache
def _warn_of_missing_filter() -> None:
    log.warning(
        "this kernel, or processor, has no filter of system calls (seccomp): the namespaces of the sandbox alone keep programs in"
    )


@functools.cache
def _warn_of_missing_group() -> None:
    log.warning(
        "judged programs have no control group here (%s): the memory of their processes is measured every %g ms instead",
        control_group.missing_reason(),
        MEASURED_SECONDS * 1000,
    )


def _too_large(limits: Limits) -> str:
    return f"it took more than {limits.memory_bytes / 2**30:g} GiB of memory"


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
        outcome = run_program("print('inside')", "", replace(PROGRAM, seconds=20))
    except RuntimeError as error:
        return f"this machine gives programs no namespaces of their own: {error}"
    return "" if outcome.output == "inside\n" else f"a program cannot be started in it: {outcome.failure}"


def _collect_output(process: subprocess.Popen[bytes], request: bytes, limits: Limits) -> tuple[bytes, bytes, str]:
    """Return what the program printed, the end of its standard error, and the limit that it exceeded (empty if none). The caller
    ends the process.

    request: the program and its input, as JSON.
    """
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    too_long = f"it took longer than {limits.seconds:g} s"
    deadline = time.monotonic() + limits.seconds + START_SECONDS
    # Writing cannot block for long: the child reads the complete request before it runs anything.
    with suppress(BrokenPipeError):
        process.stdin.write(request)
    with suppress(BrokenPipeError):
        process.stdin.close()
    output, error, error_size = b"", b"", 0
    measured_at = time.monotonic()
    with selectors.DefaultSelector() as waiting:
        for stream in (process.stdout, process.stderr):
            waiting.register(stream, selectors.EVENT_READ)
        while waiting.get_map():
            now = time.monotonic()
            if now >= deadline:
                return output, error, too_long
            if now >= measured_at + MEASURED_SECONDS:
                if private_bytes(process.pid) > limits.memory_bytes:
                    return output, error, _too_large(limits)
                measured_at = time.monotonic()
            for key, _ in waiting.select(min(deadline - now, MEASURED_SECONDS)):
                part = os.read(key.fd, 2**16)
                if not part:
                    waiting.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    output += part
                else:
                    error, error_size = (error + part)[-ERROR_BYTES:], error_size + len(part)
            if len(output) > limits.output_bytes:
                return output[: limits.output_bytes], error, f"it printed more than {limits.output_bytes:,} bytes"
            if error_size > limits.file_bytes:
                return output, error, f"it printed more than {limits.file_bytes:,} bytes to standard error"
    # The program may close its streams and go on.
    while process.poll() is None:
        if time.monotonic() >= deadline:
            return output, error, too_long
        if private_bytes(process.pid) > limits.memory_bytes:
            return output, error, _too_large(limits)
        with suppress(subprocess.TimeoutExpired):
            process.wait(MEASURED_SECONDS)
    return output, error, ""


def private_bytes(process: int) -> int:
    """Return the memory that `process` and its descendants hold for themselves, resident or swapped out, without files.

    A page that processes share since a fork counts once if this process may see shares (as root), else in each of them.
    """
    processes, at = [process], 0
    while at < len(processes):
        with suppress(OSError):
            for task in os.listdir(f"/proc/{processes[at]}/task"):
                children = Path(f"/proc/{processes[at]}/task/{task}/children").read_text()
                processes += map(int, children.split())
        at += 1
    total = sum(_private_bytes_of(process, "status", ("RssAnon:", "VmSwap:")) for process in processes)
    if total < LOOKED_AT_BYTES:
        return total
    with suppress(PermissionError):
        # The smallest of several, since the shares grow while they are read if processes end meanwhile.
        for _ in range(3):
            shares = sum(_private_bytes_of(process, "smaps_rollup", ("Pss_Anon:", "SwapPss:")) for process in processes)
            total = min(total, shares)
    return total


def _private_bytes_of(process: int, file: str, names: tuple[str, ...]) -> int:
    """Return the sum of the lines `names` of a process's `file` in /proc; 0 if it has ended. Raises PermissionError."""
    try:
        lines = Path(f"/proc/{process}/{file}").read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(names))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the sandbox with everything in it, and close its pipes."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        with suppress(OSError, AttributeError):
            pipe.close()  # type: ignore[union-attr]
