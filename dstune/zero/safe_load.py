"""Reads DeepSpeed's shards, and settings that another tool pickled, without running code that is in them."""

from __future__ import annotations

import _compat_pickle
import importlib
import io
import os
import pickle
import sys
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar, cast

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


MAX_SETTINGS_BYTES = 1 << 24
"""Most bytes of a file of settings; a `training_args.bin` has some 10 kB."""
MAX_VALUES = 100_000
"""Most values of such a file, counting a shared one as often as it is referred to: a few bytes can stand for a billion."""
MAX_LEVELS = 20

OF_SETTINGS = frozenset({"builtins", "collections", "datetime", "enum", "pathlib", "types", "typing", "uuid"})
"""Modules of Python whose classes settings may have."""
CALLS = frozenset(
    {"eval", "exec", "compile", "open", "getattr", "setattr", "delattr", "input", "breakpoint", "__import__"}
)
"""What no settings need of `builtins`."""


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


@dataclass(frozen=True)
class Settings:
    """A pickled object: its class by name, which is never imported, and its attributes."""

    class_name: str
    values: dict[str, Any]
    """Attributes that are numbers, texts, None, members of an enumeration (as their values), and lists and mappings of these."""
    unread: dict[str, str] = field(default_factory=dict)
    """Attributes that hold objects of other classes: the names of the classes."""


class _StandIn:
    """An object of a class that is not imported. Building it calls nothing."""

    name: ClassVar[str]

    def __new__(cls, *arguments: Any) -> _StandIn:
        stand_in = super().__new__(cls)
        stand_in.arguments = arguments
        stand_in.state = None
        return stand_in

    arguments: tuple[Any, ...]
    state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state


def load_settings(path: Path) -> Settings:
    """Read an object that `torch.save` wrote, for example `training_args.bin`, with torch's restricted unpickler: every class is
    replaced by an empty one of the same name.

    Raises OSError, and ValueError for a file that is damaged, too large or holds calls that no settings need.
    """
    refuse_compressed(path, MAX_SETTINGS_BYTES)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        for name in names:
            module, _, attribute = name.rpartition(".")
            module = _compat_pickle.IMPORT_MAPPING.get(module, module)  # protocol 2 has the names of Python 2
            package = module.partition(".")[0]
            calls = package in sys.stdlib_module_names and package not in OF_SETTINGS
            if calls or (module == "builtins" and attribute in CALLS):
                raise ValueError(f"it calls {module}.{attribute}, which no settings need")
        stand_ins: list[Any] = [(type("_Named", (_StandIn,), {"name": name}), name) for name in names]
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError):
        raise
    except (RuntimeError, EOFError, LookupError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise ValueError(f"it is no file of settings: {str(error).splitlines()[0]:.200}") from None
    if not isinstance(content, _StandIn) or not isinstance(content.state, dict):
        raise ValueError("it holds no object with settings")
    values: dict[str, Any] = {}
    unread: dict[str, str] = {}
    count = [0]
    for key, value in content.state.items():
        if not isinstance(key, str):
            raise ValueError("an attribute's name is no text")
        try:
            values[key] = _plain(value, count, 0)
        except _OtherClass as other:
            unread[key] = other.name
    return Settings(content.name, values, unread)


def refuse_compressed(path: Path, most_bytes: int | None = None) -> None:
    """Raise ValueError for a file that is not as `torch.save` writes it: a compressed entry may stand for any number of bytes.

    most_bytes: of all entries together. Raises OSError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile:
        raise ValueError("it is no file of torch.save") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, as torch.save writes no file")
    if most_bytes is not None and sum(entry.file_size for entry in entries) > most_bytes:
        raise ValueError(f"it has more than {most_bytes:,} bytes")


class _OtherClass(Exception):
    """A value is an object that is more than a number or text."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


def _plain(value: Any, count: list[int], level: int) -> Any:
    """Return a value of settings, with members of enumerations as their values. count: of the values so far, in its only entry."""
    count[0] += 1
    if count[0] > MAX_VALUES or level > MAX_LEVELS:
        raise ValueError(f"it has more than {MAX_VALUES:,} values, or more than {MAX_LEVELS} levels")
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple() | set():
            return [_plain(entry, count, level + 1) for entry in value]
        case dict():
            return {str(_plain(key, count, level + 1)): _plain(entry, count, level + 1) for key, entry in value.items()}
        case _StandIn(arguments=(str() | int() as member,), state=None):
            return member
        case _StandIn(arguments=(), state=dict() as state):
            return _plain(state, count, level + 1)
        case torch.dtype():
            return str(value).removeprefix("torch.")
    raise _OtherClass(value.name if isinstance(value, _StandIn) else type(value).__name__)


def _load(path: Path, source: Path | IO[bytes], map_location: Any, *, mmap: bool = False) -> Any:
    names = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    if names - ALLOWED_CLASSES:
        forbidden = ", ".join(sorted(names - ALLOWED_CLASSES))
        raise ValueError(f"{path} holds more than tensors and settings, and is not read: {forbidden}")
    classes = [getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    with torch.serialization.safe_globals(classes):
        return torch.load(source, map_location=map_location, mmap=mmap, weights_only=True)
