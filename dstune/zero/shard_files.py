"""Writes DeepSpeed's shards, at once or in the background: hashes them while writing, syncs them, and reads them back.

Importing this module imports DeepSpeed. `benchmarks/saving.py` measured why a thread of this process writes in the background.
"""

from __future__ import annotations

import copy
import io
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import safetensors.torch
import torch
import xxhash
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from torch import Tensor

from dstune.zero import accelerator
from dstune.zero.safe_load import HashedState, load, load_and_hash

AT_ONCE = 2**20
"""Bytes up to which a tensor is copied while the ranks wait."""

BLOCK = 2**24
"""Bytes written or read at a time."""

Entry = dict[str, Any]
"""A file's entry in the commit marker: `bytes` and `xxh3_64`."""


@dataclass(frozen=True)
class Copy:
    """A copy that is still to be made, of all bytes of `source`."""

    source: Tensor
    target: Tensor


@dataclass
class Save:
    """This rank's part of one checkpoint."""

    directory: Path
    entries: dict[str, Entry] = field(default_factory=dict)
    """Entries of the written files, by their paths below `directory`."""
    error: str = ""
    """Why a file could not be written; no further file is written then."""
    queue: list[tuple[Any, Path]] = field(default_factory=list)
    """States and their files that a save in the background still has to write."""
    copies: list[Copy] = field(default_factory=list)
    """Copies to be made before the states in the queue are complete."""
    copied: threading.Event = field(default_factory=threading.Event)

    def write(self, state: Any, path: Path) -> None:
        """Write a file of this save. An error of the disk is stored in `error`, not raised: the ranks must still do the collectives
        of the save, after which all of them learn of the error."""
        if self.error:
            return
        try:
            entry = write_file(state, path)
            self.entries[str(path.relative_to(self.directory))] = entry
        except OSError as error:
            self.error = str(error)

    def work_off(self) -> None:
        """Make the copies, then write all queued files. To be called in a background thread."""
        try:
            copy_to_host(self.copies)
        finally:
            self.copied.set()
        lower_thread_priority()
        for state, path in self.queue:
            self.write(state, path)
        self.queue.clear()


@dataclass(frozen=True)
class SafeTensors:
    """The content of a safetensors file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


class ShardFiles(CheckpointEngine):
    """Writes and reads shards in place of DeepSpeed's own checkpoint engine (`engine.checkpoint_engine`)."""

    def __init__(self, leave_out: Collection[str] = ()) -> None:
        """leave_out: names in the module's state that no checkpoint needs."""
        super().__init__()
        self.name = "dstune"
        self._leave_out = frozenset(leave_out)
        self._host = HostCopies()
        self._save: Save | None = None
        self._background = False
        self._copying: Save | None = None
        self._read_ahead: dict[Path, HashedState] = {}

    def begin(self, directory: Path, *, background: bool) -> Save:
        """Begin a save: everything that DeepSpeed saves until `end` becomes part of it. With `background` files are only queued,
        and the caller runs `work_off` of the returned save in a thread."""
        assert self._save is None, "one save at a time"
        self._save, self._background = Save(directory), background
        self._host.reuse()
        return self._save

    def end(self) -> None:
        if self._background:
            self._copying = self._save
        self._save = None

    def wait_for_copies(self) -> None:
        """Wait until a save in the background has copied the weights and optimizer states, so that they may change."""
        if self._copying is not None:
            self._copying.copied.wait()
            self._copying = None

    def read_ahead(self, paths: Sequence[Path]) -> list[str]:
        """Read files for the next `load` of each, and return their hashes. Files that were read ahead earlier are dropped."""
        self._read_ahead.clear()
        for path in paths:
            self._read_ahead[path] = load_and_hash(path)
        return [self._read_ahead[path].xxh3_64 for path in paths]

    # -- what DeepSpeed calls -----------------------------------------------------------------------------------------

    def create(self, info: Any) -> None: ...

    def save(self, state_dict: Any, path: str) -> None:
        assert self._save is not None, "begin() comes first"
        if self._leave_out and isinstance(state_dict.get("module"), dict):
            module_state = {name: value for name, value in state_dict["module"].items() if name not in self._leave_out}
            state_dict = {**state_dict, "module": module_state}
        if not self._background:
            self._save.write(state_dict, Path(path))
            return
        copied, copies = self._host.copy(state_dict)
        self._save.copies += copies
        self._save.queue.append((copied, Path(path)))

    def save_tensors(self, tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
        """Save a safetensors file, which DeepSpeed itself knows nothing of."""
        assert self._save is not None, "begin() comes first"
        if not self._background:
            self._save.write(SafeTensors(tensors, metadata), path)
            return
        copied, copies = self._host.copy(tensors)
        self._save.copies += copies
        self._save.queue.append((SafeTensors(copied, metadata), path))

    def load(self, path: str, map_location: Any = None) -> Any:
        hashed_state = self._read_ahead.get(
            Path(path)
        )  # kept: DeepSpeed loads a weights file twice, first only for its keys
        if hashed_state is None:
            return load(Path(path), map_location)
        if hashed_state.error is not None:
            raise hashed_state.error
        return hashed_state.state

    def commit(self, info: Any) -> bool:
        return True


class HostCopies:
    """Copies of state dictionaries in host memory. The memory is reused for the next copy, since allocating new pages costs five
    times as much as copying; with GPUs it is pinned."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._used = 0

    def reuse(self) -> None:
        """Allow `copy` to overwrite earlier copies, which are no longer needed."""
        self._used = 0

    def copy(self, state: Any) -> tuple[Any, list[Copy]]:
        """Make a deep copy whose tensors share memory as those of `state` do; return it, and the copies still to be made.

        Large tensors are left to the background thread: weights and optimizer states do not change before the next update.
        Small ones (counters, a module's buffers) and everything else are copied here.
        """
        self._later: list[Copy] = []
        copied = self._copy(state, {})
        return copied, self._later

    def _copy(self, value: Any, storages: dict[int, torch.UntypedStorage]) -> Any:
        match value:
            case Tensor():
                return self._tensor(value.detach(), storages)
            case torch.Size():
                return value
            case dict():
                copied: dict[Any, Any] = OrderedDict() if isinstance(value, OrderedDict) else {}
                copied.update((key, self._copy(entry, storages)) for key, entry in value.items())
                if hasattr(value, "_metadata"):  # a module's state has the versions of its parts there
                    copied._metadata = value._metadata  # type: ignore[attr-defined]
                return copied
            case list():
                return [self._copy(entry, storages) for entry in value]
            case tuple() if type(value) is tuple:
                return tuple(self._copy(entry, storages) for entry in value)
        return copy.copy(value)  # numbers, names, and DeepSpeed's loss scaler, which changes with later steps

    def _tensor(self, tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return tensor.cpu().clone()  # a subclass (quantized weights) knows how to copy itself
        storage = tensor.untyped_storage()
        key = storage.data_ptr() or id(storage)
        if key not in storages:
            buffer = self._buffer(storage.nbytes(), pinned=not tensor.is_cpu)
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            if storage.nbytes() > AT_ONCE:
                self._later.append(Copy(source, buffer))
            else:
                buffer.copy_(source)
            storages[key] = buffer.untyped_storage()
        copied = torch.empty(0, dtype=tensor.dtype)
        return copied.set_(storages[key], tensor.storage_offset(), tensor.size(), tensor.stride())

    def _buffer(self, size: int, pinned: bool) -> Tensor:
        if self._used == len(self._buffers) or self._buffers[self._used].numel() != size:
            # Every save has the same states in the same order, so the first one allocates all buffers.
            self._buffers[self._used :] = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned)]
        self._used += 1
        return self._buffers[self._used - 1]


def copy_to_host(copies: list[Copy]) -> None:
    """Make the copies, in a thread beside the one that computes; from GPUs on a separate stream."""
    on_gpu = [copy for copy in copies if not copy.source.is_cpu]
    if on_gpu:
        device = on_gpu[0].source.device
        stream = accelerator.module().Stream(device)
        stream.wait_stream(accelerator.module().default_stream(device))
        with accelerator.module().stream(stream):
            for host_copy in on_gpu:
                host_copy.target.copy_(host_copy.source, non_blocking=True)
        stream.synchronize()
    for host_copy in copies:
        if host_copy.source.is_cpu:
            # Not torch's copy_: it uses as many threads as a matrix product, and the two would slow each other down.
            np.copyto(host_copy.target.numpy(), host_copy.source.numpy())


def lower_thread_priority() -> None:
    """Give the computing threads priority over this one. Hashing and writing take a core, and ranks that train on the CPU have none
    to spare: on 2 cores with 2 threads of torch, steps during a save took 1.3 times as long, not 2.4 times, and the save 6.6 s,
    not 4.1 s (19 s with niceness 10 instead of 5). Linux has priorities of threads; elsewhere this does nothing."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)


class _HashingWriter(io.RawIOBase):
    """A file that hashes the bytes that are written to it."""

    def __init__(self, path: Path):
        self._file = path.open("wb", buffering=0)
        self.digest, self.size = xxhash.xxh3_64(), 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), BLOCK):
                block = view[start : start + BLOCK]
                self.digest.update(block)
                while len(block):
                    block = block[self._file.write(block) :]
        except OSError as error:  # torch's writer turns it into a RuntimeError without the reason
            self.error = error
            raise
        self.size += len(view)
        return len(view)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def sync(self) -> None:
        os.fsync(self._file.fileno())


def write_file(state: Any, path: Path) -> Entry:
    """Save `state` to `path`, sync it and read it back. Raises OSError with the file's name."""
    with _HashingWriter(path) as file:
        try:
            if isinstance(state, SafeTensors):
                contiguous = {name: tensor.cpu().contiguous() for name, tensor in state.tensors.items()}
                file.write(safetensors.torch.save(contiguous, state.metadata))
            else:
                torch.save(state, cast(IO[bytes], file))
            file.sync()
        except (OSError, RuntimeError) as error:
            raise OSError(f"{path.name}: {file.error or error}") from error
    entry = {"bytes": file.size, "xxh3_64": file.digest.hexdigest()}
    if read_back(path) != entry:
        raise OSError(f"{path.name}: reads back differently from what was written")
    return entry


def read_back(path: Path) -> Entry:
    """Return the size and hash of `path` as read from the disk, not from the page cache if the kernel agrees to drop it."""
    digest, size = xxhash.xxh3_64(), 0
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "xxh3_64": digest.hexdigest()}
