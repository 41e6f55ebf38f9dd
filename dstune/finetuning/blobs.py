"""Stores the bytes of files in a folder of the server, or in a store that fsspec supports (`s3://BUCKET/FOLDER`).

Bytes are written to disk and hashed first, and moved to their place when they are complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dstune.core.errors import Problem, UserError
from dstune.core.files import sync_path
from dstune.finetuning.ids import new_id
from dstune.finetuning.jobs.folder import link
from dstune.finetuning.receiving import Receiving
from dstune.serve.errors import ApiError

CHUNK = 1 << 20
STALE_SECONDS = 86_400
"""Age at which unfinished files are removed."""


class Staged:
    """Bytes that are being written, under their future id. Raises ApiError if there is no space."""

    def __init__(self, path: Path, complete: Callable[[Staged], None], discarded: Callable[[Staged], None]):
        self.path, self.id = path, path.name
        self.size = 0
        self.kept = False
        self._complete, self._discarded = complete, discarded
        self._hash, self._md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        self._file: BinaryIO = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0)

    def write(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self._md5.update(chunk)
        self.size += len(chunk)
        try:
            self._write(chunk)
        except OSError as error:
            raise _not_stored() from error

    def _write(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        while view:
            view = view[self._file.write(view) :]

    def close(self) -> None:
        """Close the file; afterwards all of it is on disk, or in the store."""
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            self._complete(self)
        except Exception as error:  # stores raise exceptions of their own
            raise _not_stored() from error
        finally:
            self._file.close()

    def discard(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)
        self._discarded(self)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    @property
    def md5(self) -> str:
        return self._md5.hexdigest()


class Blobs:
    """Blobs in a folder. Clients never choose an id, so none is a path from a client."""

    def __init__(self, folder: Path):
        self.folder, self._scratch = folder / "blobs", folder / "tmp"
        self.receiving = Receiving()
        for path in (self.folder, self._scratch):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def stage(self, prefix: str = "blob-") -> Staged:
        return Staged(self._scratch / new_id(prefix), self._complete, self._discarded)

    def keep(self, staged: Staged) -> None:
        """Move a complete file to its place. This must be fast, since a transaction waits for it."""
        path = self._path(staged.id)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        os.rename(staged.path, path)
        for folder in (path.parent, self.folder):
            sync_path(folder)
        staged.kept = True

    def remove(self, blob: str) -> None:
        self._path(blob).unlink(missing_ok=True)

    def read(self, blob: str) -> Iterator[bytes]:
        """Yield the content of a file in chunks. Raises FileNotFoundError if it has just been removed."""
        with self._path(blob).open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk

    def size(self, blob: str) -> int | None:
        """Return the size in bytes; None if the blob does not exist."""
        path = self._path(blob)
        return path.stat().st_size if path.is_file() else None

    def snapshot(self, blob: str, target: Path) -> None:
        """Make `target` a copy of the blob that stays when the blob is removed; a hard link if it is on the same disk."""
        link(self._path(blob), target)

    def sweep(self, referenced: Iterable[str]) -> int:
        """Remove files that no database row references, left by a crash, if they are old enough that no transaction is about to
        reference them. Returns their number."""
        removed = _remove_old(self._scratch.iterdir())
        named_blobs = set(referenced)
        return removed + _remove_old(path for path in self.folder.glob("*/*") if path.name not in named_blobs)

    def _path(self, blob: str) -> Path:
        return self.folder / blob[-2:].lower() / blob

    def _complete(self, staged: Staged) -> None:
        return

    def _discarded(self, staged: Staged) -> None:
        return


class RemoteBlobs(Blobs):
    """Blobs in a store, by its URL; the operator's environment provides the credentials. Raises UserError."""

    def __init__(self, folder: Path, url: str):
        super().__init__(folder)
        from fsspec.core import url_to_fs

        try:
            self._store, self._root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            fix = "s3://BUCKET/FOLDER with `pip install s3fs`"
            raise UserError(Problem("--files", f"cannot be used: {error}", fix)) from error

    def keep(self, staged: Staged) -> None:
        staged.kept = True  # it is already in its place once complete

    def remove(self, blob: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._store.rm_file(self._store_path(blob))

    def read(self, blob: str) -> Iterator[bytes]:
        with self._store.open(self._store_path(blob), "rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk

    def size(self, blob: str) -> int | None:
        try:
            return int(self._store.size(self._store_path(blob)))
        except FileNotFoundError:
            return None

    def snapshot(self, blob: str, target: Path) -> None:
        self._store.get_file(self._store_path(blob), str(target))

    def sweep(self, referenced: Iterable[str]) -> int:
        removed, named_blobs = _remove_old(self._scratch.iterdir()), set(referenced)
        for place in self._store.find(self._root):
            blob = str(place).rsplit("/", 1)[-1]
            if blob not in named_blobs and time.time() - self._store.modified(place).timestamp() > STALE_SECONDS:
                self.remove(blob)
                removed += 1
        return removed

    def _store_path(self, blob: str) -> str:
        return f"{self._root}/{blob}"

    def _complete(self, staged: Staged) -> None:
        self._store.makedirs(self._root, exist_ok=True)
        self._store.put_file(str(staged.path), self._store_path(staged.id))

    def _discarded(self, staged: Staged) -> None:
        if not staged.kept:
            self.remove(staged.id)


def _remove_old(paths: Iterable[Any]) -> int:
    removed = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
                removed += 1
    return removed


def _not_stored() -> ApiError:
    return ApiError(507, "The server could not store the file.", code="storage_failed")
