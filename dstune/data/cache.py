"""Make a cache entry once per node: under a file lock, as `.incomplete`, and renamed when it is complete."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dstune.core.errors import Problem, UserError, from_json, to_json

POLL_SECONDS = 30.0
"""How often a process that waits for another one logs that it waits."""

log = logging.getLogger(__name__)


def entry(root: Path, key: str, make: Callable[[Path], None]) -> Path:
    """Return the folder `root/key`, made by `make(folder)` if it does not exist yet.

    Any number of processes may call this at once: one makes the entry, the others wait. The lock is the operating
    system's, so a killed process leaves none behind and the next one starts over. Raises what `make` raises. A UserError
    of `make` is also raised in the processes that waited, without doing the work again.
    """
    folder = root / key
    if folder.is_dir():
        return folder
    began = time.time()
    failure = root / f"{key}.error"
    with _locked(root, key):
        if folder.is_dir():
            return folder
        _raise_failure_since(failure, began)
        incomplete = root / f"{key}.incomplete"
        shutil.rmtree(incomplete, ignore_errors=True)  # left by a process that was killed
        incomplete.mkdir()
        try:
            make(incomplete)
        except BaseException as error:
            shutil.rmtree(incomplete, ignore_errors=True)
            if isinstance(error, UserError):
                temporary = root / f"{key}.error-incomplete"  # `is_made` reads without the lock
                temporary.write_text(json.dumps({"time": time.time(), "error": to_json(error)}))
                os.replace(temporary, failure)
            raise
        os.rename(incomplete, folder)
        failure.unlink(missing_ok=True)
    return folder


def is_made(root: Path, key: str, since: float) -> bool:
    """Return whether another process has made the entry. Raises its UserError if it failed after `since` (`time.time()`)."""
    if (root / key).is_dir():
        return True
    _raise_failure_since(root / f"{key}.error", since)
    return False


@contextmanager
def _locked(root: Path, key: str) -> Iterator[None]:
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f"{key}.lock")
        waited = 0.0
        while True:
            try:
                lock.acquire(timeout=POLL_SECONDS)
                break
            except Timeout:
                waited += POLL_SECONDS
                log.warning("waiting for another process that prepares the data (%.0f s so far)", waited)
    except OSError as error:
        reason = f"the cache cannot be written: {error.strerror or error}"
        raise UserError(
            Problem(where="DSTUNE_CACHE", value=str(root), reason=reason, fix="set it to a folder of yours")
        ) from None
    try:
        yield
    finally:
        lock.release()


def _raise_failure_since(failure: Path, since: float) -> None:
    """Raise the error of a process that failed after `since`: it read the same files under the same settings."""
    try:
        recorded = json.loads(failure.read_text())
    except FileNotFoundError:
        return
    if recorded["time"] >= since:
        raise from_json(recorded["error"])
