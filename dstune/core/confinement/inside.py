"""Limits the process that it runs in, and all that it starts, for good. It imports nothing of dstune: the sandbox of judged
programs loads it by its path."""

from __future__ import annotations

import ctypes
import resource
import signal
from collections.abc import Mapping
from typing import Any

PR_SET_NO_NEW_PRIVS = 38
_RESOURCES = {
    "memory_bytes": resource.RLIMIT_AS,
    "processes": resource.RLIMIT_NPROC,
    "cpu_seconds": resource.RLIMIT_CPU,
    "file_bytes": resource.RLIMIT_FSIZE,
    "descriptors": resource.RLIMIT_NOFILE,
}


def set_limits(limits: Mapping[str, Any]) -> None:
    """Limit the resources of this process. Nothing that crashes is written to disk.

    limits: by the names of `table.Limits`, and `cpu_seconds`; 0: not limited.
    """
    for name, kind in _RESOURCES.items():
        if amount := limits.get(name):
            limit(kind, amount)
    if added := limits.get("added_bytes"):
        limit(resource.RLIMIT_DATA, data_bytes() + added)
    limit(resource.RLIMIT_CORE, 0)


def limit(kind: int, amount: int) -> None:
    """Set a resource limit, soft and hard; a lower hard limit stays."""
    hard = resource.getrlimit(kind)[1]
    lower = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    resource.setrlimit(kind, (lower, lower))


def data_bytes() -> int:
    """Return the bytes of this process that RLIMIT_DATA counts."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[5]) * resource.getpagesize()


def end_after(seconds: float) -> None:
    """Have the kernel end this process, whatever it is in, after so many seconds of processor time; 0: never."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)


def gain_no_privileges() -> None:
    """Gain no privileges by programs that are started, which a filter of system calls requires. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
