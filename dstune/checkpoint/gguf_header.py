"""Reads the header of an untrusted GGUF file: counts and lengths that exceed the file's size are refused.

The reader of the `gguf` package believes a count of 2^40 values and never returns.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes by the number of a type, as in llama.cpp's specification of the format."""
_TEXT, _LIST = 8, 9
_LEAST_OF_A_TENSOR = 24
"""Least bytes of a tensor's entry: lengths of name and shape, type and offset."""
MAX_HEADER_BYTES = 2**26
"""Size limit of a header; vocabularies take a few MiB. A sparse file takes no disk for a header of any size."""


def matrix_types(file: Path) -> set[int]:
    """Return the numbers of the types (GGMLQuantizationType) of all tensors that have more than one dimension.

    Raises ValueError where the file is no GGUF of version 2 or 3, or ends too early.
    """
    with file.open("rb") as stream:
        return _Header(stream, file.stat().st_size).matrix_types()


def metadata_digests(file: Path) -> dict[str, str]:
    """Return by key a digest of each value beside the tensors: architecture, vocabulary, control tokens, template.

    Without `general.*` and `quantize.*`, which describe the file. Raises ValueError as `matrix_types`.
    """
    with file.open("rb") as stream:
        return _Header(stream, file.stat().st_size).metadata_digests()


class _Header:
    def __init__(self, stream: BinaryIO, size: int):
        self._stream, self._bytes_left = stream, min(size, MAX_HEADER_BYTES)

    def metadata_digests(self) -> dict[str, str]:
        _, entries = self._start()
        digests = {}
        for _ in range(entries):
            key = self._range(self._skip_text)[8:].decode("utf-8", "replace")
            value = self._range(lambda: self._skip_value(*self._take("<I")))
            if not key.startswith(("general.", "quantize.")):
                digests[key] = f"sha256:{hashlib.sha256(value).hexdigest()[:32]}"
        return digests

    def matrix_types(self) -> set[int]:
        tensors, entries = self._start()
        for _ in range(entries):
            self._skip_text()
            self._skip_value(*self._take("<I"))
        types = set()
        for _ in range(tensors):
            if self._bytes_left < _LEAST_OF_A_TENSOR:
                raise ValueError("it ends within the list of its tensors")
            self._skip_text()
            (dimensions,) = self._take("<I")
            self._skip(8 * dimensions)
            kind, _ = self._take("<IQ")
            types |= {kind} if dimensions > 1 else set()
        return types

    def _start(self) -> tuple[int, int]:
        """Return the numbers of tensors and of values."""
        magic, version, tensors, entries = self._take("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("it does not begin as GGUF of version 2 or 3 does")
        return tensors, entries

    def _range(self, skip: Callable[[], None]) -> bytes:
        """Return the bytes that `skip` passes over."""
        start = self._stream.tell()
        skip()
        end = self._stream.tell()
        self._stream.seek(start)
        return self._stream.read(end - start)

    def _skip_value(self, kind: int) -> None:
        if kind == _TEXT:
            self._skip_text()
        elif kind == _LIST:
            of_one, count = self._take("<IQ")
            if of_one in _SCALARS:
                self._skip(_SCALARS[of_one] * count)
            elif of_one == _TEXT:
                for _ in range(count):
                    self._skip_text()
            else:
                raise ValueError(f"a list of type {of_one} is not read")
        elif kind in _SCALARS:
            self._skip(_SCALARS[kind])
        else:
            raise ValueError(f"there is no type {kind}")

    def _skip_text(self) -> None:
        self._skip(*self._take("<Q"))

    def _take(self, shape: str) -> tuple[Any, ...]:
        size = struct.calcsize(shape)
        self._count(size)
        return struct.unpack(shape, self._stream.read(size))

    def _skip(self, size: int) -> None:
        self._count(size)
        self._stream.seek(size, 1)

    def _count(self, size: int) -> None:
        """Take `size` bytes off the rest of the file. Raises ValueError if it is shorter: so no count in the file can make the
        reader do more steps than the file has bytes."""
        if size > self._bytes_left:
            raise ValueError("it is shorter, or its header longer, than it may be")
        self._bytes_left -= size
