"""Decides which group of processes may train a run: the holder of the newest generation of its lease.

The lease is a folder of numbered files on the file system that all nodes share. A generation begins when a process creates its
file, which only one process can do, and no generation begins twice. Ranks know their generation. Once a newer one exists they may
not save any more, so a group that is cut off by a network partition can never overwrite the other group's work.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dstune.core import files
from dstune.core.errors import TrainingFailed
from dstune.core.parsing import read_object

FOLDER = Path("launch") / "lease"
LEASE = "DSTUNE_LEASE"
"""Environment variable of ranks: the file of the generation that they belong to."""
KEPT_FILES = 16
"""How many files of earlier generations are kept, as a history of the run."""


@dataclass(frozen=True)
class LeaseRecord:
    """The content of a generation's file."""

    holder: str
    """Identity of the process that created the file."""
    node: str
    address: str
    """Where the holder listens for the agents of other nodes."""
    port: int
    mark: str
    """Mark of the launch whose ranks belong to this generation (`DSTUNE_LAUNCH_ID`)."""
    launch: str
    """Identity of the command or job that started the agents."""
    attempts: int = 0
    """How often this launch has started its ranks."""
    beat: int = 0
    """Grows while the holder is alive."""
    is_released: bool = False
    """Whether the holder has ended its ranks and given the lease back."""
    is_over: bool = False
    """Whether the launch is over: none of its agents will continue the run."""


class Lease:
    """The lease of one run, as one process sees it."""

    def __init__(self, run_dir: Path):
        self.folder = run_dir / FOLDER

    def newest(self) -> int:
        """Return the newest generation; 0 if there is none. Raises OSError."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return 0
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def file(self, generation: int) -> Path:
        return self.folder / f"{generation:08d}"

    def read(self, generation: int) -> LeaseRecord | None:
        """Return the record of `generation`; None if its file is empty (just created), malformed or gone."""
        values = read_object(self.file(generation)) or {}
        try:
            record = LeaseRecord(**values)
        except TypeError:
            return None
        texts = (record.holder, record.node, record.address, record.mark, record.launch)
        numbers = (record.port, record.beat, record.attempts)
        valid = all(isinstance(text, str) for text in texts) and all(type(number) is int for number in numbers)
        flags = all(isinstance(flag, bool) for flag in (record.is_released, record.is_over))
        return record if valid and flags and 0 < record.port < 65536 else None

    def take(self, after: int, record: LeaseRecord) -> int | None:
        """Begin the generation that follows `after` for the holder of `record`.

        Return its number; None if another process was faster. Raises OSError.
        """
        # Without parents: if the run directory's file system is not mounted, its mount point is an empty folder.
        self.folder.mkdir(exist_ok=True)
        generation = after + 1
        try:
            os.close(os.open(self.file(generation), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            return None
        if self.newest() != generation:  # `after` was an old number whose successors have been removed
            return None
        self.write(generation, record)
        for old in self.folder.glob("[0-9]*"):
            if old.name.isdecimal() and int(old.name) <= generation - KEPT_FILES:
                old.unlink(missing_ok=True)
        return generation

    def write(self, generation: int, record: LeaseRecord) -> None:
        """Replace the record of a generation that this process holds. Raises OSError."""
        files.write(self.file(generation), json.dumps(asdict(record)), mode=0o600)

    def renew(self, generation: int, record: LeaseRecord) -> None:
        """Show that the holder is alive by writing `record`, whose `beat` has grown. Raises OSError."""
        try:
            self.write(generation, record)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            os.utime(self.file(generation))  # a full disk must not end the lease: it does not end training either

    def renewed(self, generation: int) -> int:
        """Return a number that changes with each `renew` of `generation`, whatever its record says; 0 if its file is gone."""
        try:
            descriptor = os.open(self.file(generation), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return 0
        try:
            return os.fstat(descriptor).st_mtime_ns  # of the open file: NFS clients do not answer that from their cache
        finally:
            os.close(descriptor)


def new_holder() -> str:
    """Return an identity that no other process has."""
    return secrets.token_hex(16)


def is_superseded(variables: Mapping[str, str] | None = None) -> bool:
    """Return whether this rank's generation of the lease is no longer the newest. Ranks without a lease (on one machine, or under
    another launcher) are never superseded."""
    path = (os.environ if variables is None else variables).get(LEASE)
    if not path:
        return False
    try:
        names = os.listdir(Path(path).parent)
    except OSError:  # the file system does not answer; then the save itself fails too
        return False
    return max((int(name) for name in names if name.isdecimal()), default=0) > int(Path(path).name)


def refuse_if_superseded(variables: Mapping[str, str] | None = None) -> None:
    """Raise TrainingFailed in a rank whose generation of the lease is not the newest one any more."""
    if is_superseded(variables):
        raise TrainingFailed(
            "another group of nodes has taken this run over: its lease has a newer generation than this rank's"
        )
