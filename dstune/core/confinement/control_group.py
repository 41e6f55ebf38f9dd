"""Control groups (cgroup v2): the kernel counts all memory of a group's processes, whatever holds it, and kills them beyond a
limit.

Groups are made beside the group of this process, since a group with processes has no groups with limits below it. That takes a
folder that this user may write to: systemd delegates one to the sessions of a user, and to a service with `Delegate=memory` and
`DelegateSubgroup=main`. Documentation: https://docs.kernel.org/admin-guide/cgroup-v2.html.
"""

from __future__ import annotations

import functools
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "dstune-program-"
END_SECONDS = 2.0
"""Time for killed processes to leave their group."""


class ControlGroup:
    """A group with a limit of memory."""

    def __init__(self, folder: Path):
        self._folder = folder

    def add(self, process: int) -> None:
        """Move a process into the group, with everything that it will start. Raises OSError."""
        (self._folder / "cgroup.procs").write_text(str(process))

    @property
    def is_exceeded(self) -> bool:
        """Whether the kernel has killed a process of the group for its memory."""
        with suppress(OSError):
            events = dict(line.split() for line in (self._folder / "memory.events").read_text().splitlines())
            return int(events.get("oom_kill", 0)) > 0
        return False

    def end(self) -> None:
        """Kill the processes of the group, and remove it. A group whose processes do not end in time stays, without effect."""
        with suppress(OSError):  # Linux 5.14; the caller kills too
            (self._folder / "cgroup.kill").write_text("1")
        deadline = time.monotonic() + END_SECONDS
        while True:
            try:
                self._folder.rmdir()
            except FileNotFoundError:
                return
            except OSError:  # busy: a killed process has not left yet
                if time.monotonic() > deadline:
                    return
                time.sleep(0.005)
            else:
                return


@contextmanager
def memory_group(most_bytes: int) -> Iterator[ControlGroup | None]:
    """Yield a group whose processes may have `most_bytes` of memory together, of any kind; None if this process can make none
    (`missing_reason`). At the end of the block, its processes are killed."""
    parent, _ = _parent_or_reason()
    folder = None if parent is None else parent / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    if folder is None:
        yield None
        return
    try:
        folder.mkdir()
    except OSError:  # no more groups may be made: the other limits hold
        yield None
        return
    group = ControlGroup(folder)
    try:
        limits = {"memory.max": most_bytes, "memory.swap.max": 0, "memory.oom.group": 1}
        for name, value in limits.items():
            with suppress(FileNotFoundError):  # without swap, there is no file for it
                (folder / name).write_text(str(value))
        yield group
    finally:
        group.end()


def missing_reason() -> str:
    """Return why this process can make no control group with a limit of memory; empty if it can."""
    return _parent_or_reason()[1]


@functools.cache
def _parent_or_reason() -> tuple[Path | None, str]:
    """Return the folder in which this process can make groups, or None and why there is none."""
    try:
        own = _group_of_this_process()
        if own is None:
            return None, "no cgroup v2 is mounted"
        parent = own.parent if (own.parent / "cgroup.procs").exists() else own
        if "memory" not in (parent / "cgroup.controllers").read_text().split():
            return None, f"{parent} has no memory controller"
        control = parent / "cgroup.subtree_control"
        if "memory" not in control.read_text().split():
            control.write_text("+memory")
        if not os.access(parent / "cgroup.procs", os.W_OK):
            return None, f"this user may not move processes within {parent}"
        trial = parent / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        trial.mkdir()
    except OSError as error:
        return None, f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    try:
        return (parent, "") if (trial / "memory.max").exists() else (None, f"{parent} gives its groups no memory.max")
    finally:
        trial.rmdir()


def _group_of_this_process() -> Path | None:
    """Return the folder of the group (v2) that this process is in; None if no such file system is mounted. Raises OSError."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    # The type follows the dash; before it are: number, parent, device, root, mount point, options, optional fields.
    mounts = [line.split(" - ") for line in lines if " - cgroup2 " in line]
    groups = [line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::/")]
    if not mounts or not groups:
        return None
    root, mount_point = mounts[0][0].split()[3:5]
    path = groups[0].removeprefix("0::")
    return Path(mount_point) / path.removeprefix(root).lstrip("/")
