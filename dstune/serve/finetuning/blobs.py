"""Bytes on the disk: written beside, hashed on the way, and moved to their place when they are complete."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from dstune.serve.errors import ApiError
from dstune.serve.finetuning.ids import new_id

CHUNK = 1 << 20
STALE_SECONDS = 86_400
"""After which what nobody finished is removed."""


class Staged:
    """A file that is being written. Raises ApiError where the disk is full."""

    def __init__(self, path: Path):
        self.path = path
        self.size = 0
        self._hash, self._md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        self._file: BinaryIO = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0)

    def write(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self._md5.update(chunk)
        self.size += len(chunk)
        try:
            self._write(chunk)
        except OSError as error:
            raise _no_space(error) from error

    def _write(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        while view:
            view = view[self._file.write(view) :]

    def close(self) -> None:
        """All of it is on the disk after this."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _no_space(error) from error
        finally:
            self._file.close()

    def discard(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    @property
    def md5(self) -> str:
        return self._md5.hexdigest()


class Blobs:
    """The folder of all bytes. An id is in no path that a client could name."""

    def __init__(self, folder: Path):
        self.folder, self._scratch = folder / "blobs", folder / "tmp"
        for path in (self.folder, self._scratch):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def stage(self) -> Staged:
        return Staged(self._scratch / new_id("staged-"))

    def keep(self, staged: Staged, blob: str) -> None:
        """Move what is complete to its place."""
        path = self._path(blob)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        os.rename(staged.path, path)
        for folder in (path.parent, self.folder):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def remove(self, blob: str) -> None:
        self._path(blob).unlink(missing_ok=True)

    def read(self, blob: str) -> Iterator[bytes]:
        with self._path(blob).open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk

    def snapshot(self, blob: str, target: Path) -> None:
        """The bytes under another path, which they outlive the blob under: a link where the disk is the same."""
        try:
            os.link(self._path(blob), target)
        except OSError:
            shutil.copyfile(self._path(blob), target)

    def sweep(self, known: Iterable[str]) -> int:
        """Remove what no row of the database names, as a crash leaves it, when it is old enough that nobody is about to name
        it; the number of files."""
        kept, removed = set(known), 0
        unnamed = (path for path in self.folder.glob("*/*") if path.name not in kept)
        for path in (*self._scratch.iterdir(), *unnamed):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
                    removed += 1
        return removed

    def _path(self, blob: str) -> Path:
        return self.folder / blob[-2:].lower() / blob


def _no_space(error: OSError) -> ApiError:
    return ApiError(507, "The server could not store the file.", code="storage_failed")
