"""Finds out which operations that a run directory needs a file system does not support."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from dstune.core.files import sync_path


def refused_operations(place: Path) -> dict[str, str]:
    """Return the operations that fail where `place` is or would be created, with the reasons. They are tried in a temporary folder.
    Empty if all work, and if nothing can be created at all, which the start reports itself."""
    existing = next((folder for folder in (place, *place.absolute().parents) if folder.is_dir()), None)
    if existing is None:
        return {}
    try:
        probe = Path(tempfile.mkdtemp(prefix=".dstune-probe-", dir=existing))
    except OSError:
        return {}
    try:
        return {name: reason for name, attempt in ATTEMPTS.items() if (reason := _reason(attempt, probe))}
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _reason(attempt: Callable[[Path], None], folder: Path) -> str:
    try:
        attempt(folder)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _append(folder: Path) -> None:
    for word in (b"one", b"two"):
        with open(folder / "appended", "ab", buffering=0) as stream:
            stream.write(word)
    if (folder / "appended").read_bytes() != b"onetwo":
        raise OSError("what is appended replaces what was there")


def _lock(folder: Path) -> None:
    with open(folder / "locked", "wb") as first, open(folder / "locked", "wb") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
    raise OSError("a lock keeps nobody out")


def _rename_file(folder: Path) -> None:
    for name in ("file", "file-renamed"):
        (folder / name).write_bytes(b"")
    os.replace(folder / "file", folder / "file-renamed")


def _rename_folder(folder: Path) -> None:
    (folder / "folder").mkdir()
    (folder / "folder" / "file").write_bytes(b"")
    (folder / "folder").rename(folder / "folder-renamed")
    (folder / "folder-renamed" / "file").read_bytes()


def _change_mode(folder: Path) -> None:
    (folder / "mode").write_bytes(b"")
    (folder / "mode").chmod(0o644)


def _sync(folder: Path) -> None:
    (folder / "synced").write_bytes(b"")
    for path in (folder / "synced", folder):
        sync_path(path)


ATTEMPTS = {
    "append": _append,
    "lock": _lock,
    "rename files": _rename_file,
    "rename folders": _rename_folder,
    "change modes": _change_mode,
    "sync": _sync,
}
"""Operations by their names in the message."""
