"""Reads and writes files in folders that may come from strangers: links in the place of files are never followed.

If `run.yaml` in a stranger's run directory were a link to `~/.bashrc`, the next start would write there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from pathlib import Path
from typing import IO

from dstune.core.disk import is_disk_full
from dstune.core.errors import Problem, UserError

INCOMPLETE = ".incomplete"
PROBE_BYTES = 1 << 16
"""How much a disk must take to count as not full: less than a launch writes before its first step."""


def full_disk(folder: Path) -> str:
    """Return that the disk of `folder` is full, by trying to write there; empty if it is not, or if something else prevents it."""
    probe = folder / f".{secrets.token_hex(8)}{INCOMPLETE}"
    try:
        write(probe, bytes(PROBE_BYTES), sync=True)
        probe.unlink()
    except OSError as error:
        if is_disk_full(error):
            return f"the disk of {folder} is full ({error.strerror})"
    return ""


def write(path: Path, content: str | bytes, *, mode: int = 0o666, sync: bool = False) -> None:
    """Replace `path` by a file with `content`, completely or not at all. A link is replaced, and its target does not change.

    mode: of the file, less the umask. sync: wait until the content has reached the disk. Raises OSError.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{INCOMPLETE}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        _put(temporary, path, data, mode)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_path(path: Path) -> None:
    """Wait until the file `path`, or the entries of the folder `path`, have reached the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path, bits: int = 64) -> str:
    """Return the XXH3 hash of the file's bytes, of 64 or 128 bits, hexadecimal."""
    import xxhash

    digest = xxhash.xxh3_64() if bits == 64 else xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def try_lock(descriptor: int) -> int | None:
    """Lock the file until `descriptor` is closed, and return `descriptor`. If another process has the lock, close it and return
    None."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _put(temporary: Path, path: Path, data: bytes, mode: int) -> None:
    """Rename `temporary` to `path`; if the file system cannot rename, write `path` in place."""
    try:
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        with create_or_truncate(path, mode=mode) as stream:
            stream.write(data)
        temporary.unlink()


def append(path: Path, *, mode: int = 0o666) -> IO[bytes]:
    """Open `path` for appending, unbuffered.

    Raises:
        UserError: it is a link or not a regular file.
        OSError: as `open`.
    """
    return os.fdopen(open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, mode), "ab", buffering=0)


def create_or_truncate(path: Path, *, mode: int = 0o666) -> IO[bytes]:
    """Open `path` for writing and truncate it. Raises like `append`."""
    return os.fdopen(open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb")


def open_plain(path: Path, flags: int, mode: int = 0o666) -> int:
    """Return a descriptor of the regular file `path`. Raises UserError if it is a link or not a regular file, OSError like
    `os.open`."""
    try:
        # O_NONBLOCK: opening a pipe in the place of the file would wait for a reader forever.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, mode)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK, errno.ENXIO):
            raise
        raise _refused(path) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _refused(path)
    return descriptor


def read_plain(path: Path) -> bytes:
    """Return the content of the regular file `path`. Raises like `open_plain`."""
    with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as stream:
        return stream.read()


def _refused(path: Path) -> UserError:
    reason = "this is a link or not a regular file, so writing to it could change a file elsewhere"
    return UserError(Problem(str(path), reason, f"look where it leads, then remove it: rm {path.name}"))


def read_own(path: Path) -> bytes:
    """Return the content of a file that belongs to this user and that nobody else can read or write.

    Raises:
        PermissionError: the file belongs to another user, is not regular, or others may read or write it.
        OSError: as `open`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise PermissionError(errno.EPERM, "not a file of this user alone", str(path))
        return stream.read()
