"""Reading DeepSpeed's shards without running what is in them."""

from __future__ import annotations

import importlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
import xxhash

KNOWN = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)
"""Classes of DeepSpeed whose objects stand in its shards; they hold numbers."""


BLOCK = 1 << 22
"""Bytes hashed at a time that torch has not asked for."""
GAP = 1 << 16
"""Bytes between two reads that are read too, so that the hash goes on: headers and padding between storages."""


def load(path: Path, map_location: Any = "cpu", *, mmap: bool = False) -> Any:
    """Load the state in `path`, with torch's unpickler that builds tensors, containers and numbers, and objects of KNOWN. Raises
    ValueError where the file holds anything else."""
    return _load(path, path, map_location, mmap=mmap)


@dataclass(frozen=True)
class HashedState:
    """What a file holds, and the hash of the file."""

    state: Any
    error: Exception | None
    """Why the file cannot be read as a state, as after damage."""
    xxh3_64: str


def load_and_hash(path: Path) -> HashedState:
    """Load `path` as `load` does, and hash it while it is read: each byte is read once. Raises OSError."""
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
    """A file that hashes what is read of it. Torch reads the storages of a file in the order in which they are in it."""

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
        """Return the hash of the file; what has not been read of it is read now."""
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
    if names - KNOWN:
        others = ", ".join(sorted(names - KNOWN))
        raise ValueError(f"{path} holds more than tensors and settings, and is not read: {others}")
    classes = [getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    with torch.serialization.safe_globals(classes):
        return torch.load(source, map_location=map_location, mmap=mmap, weights_only=True)
