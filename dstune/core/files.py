"""Files in folders that somebody else may have prepared: a link in the place of a file is never followed.

A run directory may come from a stranger. `run.yaml` that is a link to `~/.bashrc` would let the next start write there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from pathlib import Path
from typing import IO

from dstune.core.errors import Problem, UserError

INCOMPLETE = ".incomplete"


def write(path: Path, content: str | bytes, *, mode: int = 0o666, sync: bool = False) -> None:
    """Put `content` in the place of `path`, whole or not at all; a link there is replaced, its target stays as it is.

    mode: of the file, less the umask. sync: it has reached the disk when this returns. Raises OSError.
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
    """Wait until the file or the entries of the folder `path` have reached the disk. Raises OSError."""
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
    """Hold the file until `descriptor`, which is returned, is closed; None, and it is closed, where another process does."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _put(temporary: Path, path: Path, data: bytes, mode: int) -> None:
    """Give `temporary` its name; where a file system renames nothing, write `path` itself."""
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
        UserError: it is a link or no file. OSError: as `open`.
    """
    return os.fdopen(open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, mode), "ab", buffering=0)


def create_or_truncate(path: Path, *, mode: int = 0o666) -> IO[bytes]:
    """Open `path` for writing, empty. Raises as `append`."""
    return os.fdopen(open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb")


def open_plain(path: Path, flags: int, mode: int = 0o666) -> int:
    """Return a descriptor of the plain file `path`. Raises UserError where it is a link or no file, OSError as `os.open`."""
    try:
        # Not blocking: a pipe in the place of a file would wait for a reader for ever.
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
    """Return the content of the plain file `path`. Raises as `open_plain`."""
    with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as stream:
        return stream.read()


def _refused(path: Path) -> UserError:
    reason = "this is a link or no plain file, and writing to it could change a file elsewhere"
    return UserError(Problem(str(path), reason, f"look where it leads, then remove it: rm {path.name}"))


def read_own(path: Path) -> bytes:
    """Return the content of a file that only its owner, who must be this user, can have written or read.

    Raises:
        PermissionError: another user's file, a link, or one that others may read or write.
        OSError: as `open`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise PermissionError(errno.EPERM, "not a file of this user alone", str(path))
        return stream.read()
