"""Starts the processes of jobs.

Each process has its own session, receives only listed variables of the environment, and holds its folder's lock.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from dstune.core import files
from dstune.core.child_python import child_environment
from dstune.core.paths import STOP_FILE
from dstune.core.secrets import is_secret
from dstune.finetuning.jobs.folder import NOW, JobFolder, write
from dstune.launch.commands import EXPORTED_NAMES, EXPORTED_PREFIXES
from dstune.protocols import LAUNCHERS

PROGRAM = (sys.executable, "-m", "dstune.finetuning.jobs.process")
NEVER_PREFIXES = ("WANDB_", "OPENAI_", "PG")
"""Variables of the server's own accounts; a job gets only its project's key."""


class Launcher(Protocol):
    def start(self, folder: JobFolder, task: Mapping[str, Any], env: Mapping[str, str]) -> bool:
        """Start the process of a job. env: additional variables. Returns False while another process of the job is alive."""
        ...

    def is_alive(self, folder: JobFolder) -> bool: ...

    def reap(self) -> None:
        """Reap processes that have ended."""
        ...


class ProcessLauncher:
    """Starts jobs as child processes. prefix: returns the command that puts a process into its own control group; called at each
    start. program: the command before FOLDER and LOCK."""

    def __init__(self, prefix: Callable[[], Sequence[str]] = tuple, program: Sequence[str] = PROGRAM):
        self._prefix, self._program = prefix, program
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self, folder: JobFolder, task: Mapping[str, Any], env: Mapping[str, str]) -> bool:
        lock = folder.acquire()
        if lock is None:
            return False
        try:
            folder.stop.unlink(missing_ok=True)
            folder.ended.unlink(missing_ok=True)
            (folder.run / STOP_FILE).unlink(missing_ok=True)
            write(folder.task, dict(task))
            command = [*self._prefix(), *self._program, str(folder.path), str(lock)]
            with files.append(folder.log, mode=0o600) as log:
                child = subprocess.Popen(
                    command,
                    env=environment(os.environ) | dict(env),
                    cwd=folder.path,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(lock,),
                    start_new_session=True,
                )
        finally:
            os.close(lock)  # the child holds the lock now
        self._children.append(child)
        return True

    def is_alive(self, folder: JobFolder) -> bool:
        return folder.is_alive()

    def reap(self) -> None:
        self._children = [child for child in self._children if child.poll() is None]


def environment(server_environment: Mapping[str, str]) -> dict[str, str]:
    """Return the part of the server's environment that a job's process inherits: no keys, and no addresses that contain one."""
    queues = (room.queue for room in LAUNCHERS.classes().values() if room.queue is not None)
    inherited_names = EXPORTED_NAMES.union(*(queue.variables for queue in queues))
    passed_on = {
        name: value
        for name, value in server_environment.items()
        if (name in inherited_names or name.startswith(EXPORTED_PREFIXES))
        and not name.startswith(NEVER_PREFIXES)
        and not is_secret(name, value)
    }
    return child_environment(passed_on)


def device_environment(devices: Sequence[int], names: Sequence[str]) -> dict[str, str]:
    """Return the variables that assign devices to a job. names: this machine's GPUs in the form of CUDA_VISIBLE_DEVICES; empty if
    it has none."""
    if not names:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[device] for device in devices if device < len(names))}


def stop_orphan(folder: JobFolder, how: str) -> None:
    """Ask training that has outlived its job process to end. This is called repeatedly, so a training that is to save first gets
    no signal: a second one would end it without saving."""
    import signal

    import psutil

    from dstune.launch import records

    launched = records.read_launch(folder.run)
    process = launched.process(folder.run) if launched is not None else None
    with contextlib.suppress(psutil.Error):  # it has ended in the meantime
        if process is None or str(folder.path) in (parent.cmdline() if (parent := process.parent()) else ()):
            return  # its job process is alive and passes the request on
        if how == NOW:
            process.send_signal(signal.SIGTERM)
        else:
            files.write(folder.run / STOP_FILE, "")
