"""Reads DeepSpeed's shards without running code that is in them."""

from __future__ import annotations

import importlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
import xxhash

ALLOWED_CLASSES = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)
"""Classes of DeepSpeed whose objects its shards contain; they hold only numbers."""


BLOCK = 1 << 22
"""Bytes read at a time only to hash them, where torch did not read them."""
GAP = 1 << 16
"""Largest gap between two of torch's reads that is read for the hash at once: headers and padding between storages."""


def load(path: Path, map_location: Any = "cpu", *, mmap: bool = False) -> Any:
    """Load the state in `path` with torch's restricted unpickler, which builds tensors, containers, numbers and objects of
    `ALLOWED_CLASSES`. Raises ValueError if the file holds anything else."""
    return _load(path, path, map_location, mmap=mmap)


@dataclass(frozen=True)
class HashedState:
    """The state in a file, and the file's hash."""

    state: Any
    error: Exception | None
    """Why the file cannot be read as a state, for example because it is damaged."""
    xxh3_64: str


def load_and_hash(path: Path) -> HashedState:
    """Load `path` as `load` does, and hash it in the same pass. Raises OSError."""
    with HashedFile(path) as file:
        state, reason = None, None
        try:
            state = _load(path, cast(IO[bytes], file), "cpu")
        except OSError:
            raise
        except Exception as error:
            reason = error
        return HashedState(state, reason, file.hexdigest())


class HashedFile(io.RawIOBase):
    """A file that hashes the bytes that are read. Torch reads the storages in the order in which the file has them."""

    def __init__(self, path: Path):
        self._file = path.open("rb", buffering=0)
        self._digest, self._hashed = xxhash.xxh3_64(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        start = self._file.tell()
        count = self._file.readinto(buffer) or 0
        if self._hashed < start <= self._hashed + GAP:
            self._hash_until(start)
        if start <= self._hashed < start + count:
            self._digest.update(memoryview(buffer).cast("B")[self._hashed - start : count])
            self._hashed = start + count
        return count

    def hexdigest(self) -> str:
        """Return the hash of the complete file; bytes that were not read yet are read now."""
        self._hash_until(os.fstat(self._file.fileno()).st_size)
        return self._digest.hexdigest()

    def _hash_until(self, end: int) -> None:
        while self._hashed < end:
            block = os.pread(self._file.fileno(), min(BLOCK, end - self._hashed), self._hashed)
            if not block:  # the file has become shorter
                return
            self._digest.update(block)
            self._hashed += len(block)

    def close(self) -> None:
        self._file.close()
        super().close()


def _load(path: Path, source: Path | IO[bytes], map_location: Any, *, mmap: bool = False) -> Any:
    names = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    if names - ALLOWED_CLASSES:
        forbidden = ", ".join(sorted(names - ALLOWED_CLASSES))
        raise ValueError(f"{path} holds more than tensors and settings, and is not read: {forbidden}")
    classes = [getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    with torch.serialization.safe_globals(classes):
        return torch.load(source, map_location=map_location, mmap=mmap, weights_only=True)
