"""A lease in the database on running jobs: it prevents duplicate work, but correctness does not depend on it."""

from __future__ import annotations

import os
import secrets
import socket
import time

import psutil

from dstune.finetuning.jobs.tables import Lease
from dstune.serve.store.database import Database


def owner() -> str:
    """Return a name of this process by which other processes on this machine can tell whether it still runs."""
    started = psutil.Process().create_time()
    return f"{socket.gethostname()[:24]}/{os.getpid()}/{started:.0f}/{secrets.token_hex(4)}"


def take(database: Database, name: str, owner: str, seconds: float) -> bool:
    """Take or renew the lease for `seconds`. Returns whether this process holds it."""
    now = time.time()
    with database.writing.begin() as session:
        row = session.get(Lease, name, with_for_update=True)
        if row is None:
            session.add(Lease(name=name, owner=owner, until=now + seconds))
            return True
        if row.owner != owner and now < row.until and not _is_gone(row.owner):
            return False
        row.owner, row.until = owner, now + seconds
    return True


def release(database: Database, name: str, owner: str) -> None:
    with database.writing.begin() as session:
        row = session.get(Lease, name, with_for_update=True)
        if row is not None and row.owner == owner:
            row.until = 0.0


def _is_gone(other: str) -> bool:
    """Return whether the owner was a process of this machine that has ended; False for other machines, whose processes cannot be
    checked."""
    try:
        host, pid, started, _ = other.split("/")
        if host != socket.gethostname()[:24]:
            return False
        return abs(psutil.Process(int(pid)).create_time() - float(started)) > 2.0
    except psutil.NoSuchProcess:
        return True
    except (ValueError, psutil.Error):
        return False
