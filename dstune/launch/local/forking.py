"""Turns a fork of a process that has done all imports into the process that was requested.

In the requesting process, `describe` lists what a child that it started itself would inherit. In the fork, `become` applies that.
Descriptors, variables, limits and signal handling of one request never reach another one, because each fork comes from a process
that has done nothing but imports (`fork_server`).
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ARGUMENT_ROOM, ENVIRONMENT_ROOM = 4_000, 32_000
"""Bytes reserved for the command line and the environment that /proc shows of a fork."""
ROOM_VARIABLE = "DSTUNE_FORK_ROOM"
LIMITS = {name: value for name, value in sorted(vars(resource).items()) if name.startswith("RLIMIT_")}
MEMORY_LIMITS = ("RLIMIT_AS", "RLIMIT_DATA")
PYTHON_SIGNALS = {signal.SIGPIPE, signal.SIGXFSZ}
"""Signals that every Python process ignores."""
C_SIGNALS = {signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL}
"""Signals that have handlers in C (`PYTHONFAULTHANDLER`)."""
SIGNALS = sorted(signal.valid_signals() - PYTHON_SIGNALS - C_SIGNALS - {signal.SIGKILL, signal.SIGSTOP})


def describe(cwd: str | None = None) -> dict[str, Any]:
    """Return what a child of this process would inherit, in values that JSON can hold."""
    return {
        "cwd": os.path.abspath(cwd or os.getcwd()),
        "umask": _umask(),
        "affinity": sorted(os.sched_getaffinity(0)),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "limits": {name: resource.getrlimit(number) for name, number in LIMITS.items()},
        "ignored": [int(number) for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN],
        "blocked": sorted(int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    }


def context() -> dict[str, Any]:
    """Return properties that a fork keeps from its parent and no request can change, such as user and namespaces."""
    return {
        "user": [os.getresuid(), os.getresgid(), sorted(os.getgroups())],
        "control group": Path("/proc/self/cgroup").read_text(),
        "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in sorted(os.listdir("/proc/self/ns"))},
        "root folder": os.readlink("/proc/self/root"),
        "scheduling policy": os.sched_getscheduler(0),
        "out-of-memory score": Path("/proc/self/oom_score_adj").read_text().strip(),
    }


def initial_environment() -> dict[str, str]:
    """Return the variables that this process was started with."""
    entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    return dict(os.fsdecode(entry).split("=", 1) for entry in entries if b"=" in entry)


def _umask() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("Umask:", 1)[1].split()[0], 8)


def become(request: Mapping[str, Any], streams: Sequence[int], places: Places) -> None:
    """Turn this fork into the requested process, with a session of its own and everything that `describe` lists.

    request: the dictionary of `describe`, with `argv` and `env`. streams: descriptors for stdin, stdout and stderr, all above 2.

    Raises:
        OSError, ValueError: something cannot be applied, such as a limit above the hard limit of this process.
    """
    os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    apply_request(request)
    places.show(request["argv"], request["env"])
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])


def apply_request(request: Mapping[str, Any]) -> None:
    """Give this process the variables (`env`) and everything that `describe` lists except blocked signals. Raises as `become`."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else signal.SIG_DFL)
    if signal.SIGINT not in request["ignored"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.umask(request["umask"])
    os.sched_setaffinity(0, request["affinity"])
    if request["nice"] != os.getpriority(os.PRIO_PROCESS, 0):
        os.setpriority(os.PRIO_PROCESS, 0, request["nice"])
    for name, limits in request["limits"].items():
        if tuple(limits) != resource.getrlimit(LIMITS[name]):
            resource.setrlimit(LIMITS[name], tuple(limits))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    _reset_modules()


def _reset_modules() -> None:
    """Renew random state that each process has for itself, and drop values that modules cached from the environment."""
    tempfile.tempdir = None  # Python itself seeds `random` after a fork
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
    if (processes := sys.modules.get("multiprocessing.process")) is not None:
        processes.current_process().authkey = os.urandom(32)


class Places:
    """The memory from which /proc shows the command line and the environment of this process and its forks.

    Overwriting it lets `ps` show a fork as what it is, and `dstune.launch.processes` find it by the mark in its environment. The
    process was started with `padding()`: its own variables, which C libraries may still point to, lie after it and stay.
    """

    def __init__(self) -> None:
        fields = Path("/proc/self/stat").read_text().rsplit(") ", 1)[1].split()
        # `man 5 proc_pid_stat`: arg_start, arg_end, env_start, env_end are fields 48 to 51, counted from 1.
        arguments, arguments_end, variables, variables_end = (int(fields[number - 3]) for number in (48, 49, 50, 51))
        self._arguments = (arguments, arguments_end - arguments)
        size = variables_end - variables
        name = ctypes.string_at(variables, min(size, len(ROOM_VARIABLE))) if variables else b""
        self._variables = (variables, ENVIRONMENT_ROOM if name == ROOM_VARIABLE.encode() else 0)

    def show(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Write the command line and the environment that `ps` shows, each cut to its space.

        dstune's variables come first, because they mark the process as one of a launch.
        """
        entries = [f"{name}={env[name]}" for name in sorted(env, key=lambda name: not name.startswith("DSTUNE_"))]
        for (start, size), texts in ((self._arguments, argv), (self._variables, entries)):
            if size:
                content = b"".join(os.fsencode(text) + b"\0" for text in texts)[: size - 1]
                ctypes.memmove(start, content.ljust(size, b"\0"), size)


def padding() -> dict[str, str]:
    """Return the variable that must come first in the environment of the process that is forked later."""
    return {ROOM_VARIABLE: "x" * ENVIRONMENT_ROOM}
