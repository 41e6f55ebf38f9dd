"""Data files: which endings are read, how a file is opened (compressed, or inside a zip archive), and its digest."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from dstune.config.data_schema import TextRows
from dstune.core.errors import Problem, UserError, first_line
from dstune.core.files import hash_file

DOCUMENTS = (".txt", ".md")
TAGGED = (".conll", ".conllu", ".bio", ".iob")
TEXTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", *DOCUMENTS, *TAGGED)
TABLES = (".parquet", ".arrow", ".feather")
MAX_XZ_BYTES = 2**30
"""Memory to decompress an `.xz` file. `xz -9` needs 65 MiB."""
MAX_ENTRIES_READ = 10**7
"""Number of members of a zip archive times its files with rows: each is opened by itself, which reads the list of all members."""
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
ENDINGS = (*TEXTS, *TABLES)
"""Endings of files with rows. Those in TEXTS may be followed by one of COMPRESSIONS, or be inside a .zip archive."""


Rows = tuple[int, int]
"""Numbers [first, last) of rows, from 0."""


@dataclass(frozen=True)
class DataFile:
    """One file with rows."""

    path: Path
    member: str = ""
    """Name of the file inside the zip archive `path`; empty if `path` is no archive."""
    text_rows: TextRows = TextRows.line
    """What counts as a row in plain text."""
    label: str = ""
    """The file's name in messages; the path if empty."""
    digest: str = ""
    """Identifies the content if it is known without reading the file (a file of the hub at a commit)."""
    rows: Rows | None = None
    """The slice of rows to read; None for all."""

    def __str__(self) -> str:
        return self.label or (f"{self.path}!{self.member}" if self.member else str(self.path))

    @property
    def ending(self) -> str:
        """The ending that tells the format, without that of a compression: `.csv` of `rows.csv.gz`."""
        return ending_of(self.member or self.path.name)

    @property
    def compression(self) -> str:
        """The ending of the compression (`.gz`, `.bz2`, ...); empty without one."""
        suffix = Path(self.member or self.path.name).suffix.lower()
        return suffix if suffix in COMPRESSIONS else ""


@dataclass(frozen=True)
class RawRow:
    """One row of a file as it was read. If it could not be read, `fields` is None and `error` says why."""

    file: DataFile
    line: int
    """First line of the row, from 1; in a Parquet or Arrow file the row's number."""
    fields: dict[str, Any] | None
    error: str = ""

    @property
    def place(self) -> str:
        return place(self.file, self.line)


def place(file: DataFile | Path | str, line: int) -> str:
    """Return `FILE:LINE`, the form in which messages name a row."""
    return f"{file}:{line}"


def ending_of(name: str) -> str:
    """Return the ending of a file's name, in lower case and without that of a compression."""
    path = Path(name)
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSIONS else path.suffix.lower()


def is_readable(name: str) -> bool:
    """Return whether a file of this name holds rows that can be read."""
    ending = ending_of(name)
    compressed = Path(name).suffix.lower() in COMPRESSIONS
    return ending in TEXTS if compressed else ending in ENDINGS


def fingerprint(file: DataFile) -> str:
    """Return the digest of the file's bytes (128 bit, hexadecimal), followed by the options that decide how they are read."""
    options = file.member + file.ending + file.compression + (file.text_rows.name if file.ending in DOCUMENTS else "")
    options += "" if file.rows is None else f"[{file.rows[0]}:{file.rows[1]}]"
    if file.digest:
        return file.digest + options
    return hash_file(file.path, bits=128) + options


@contextmanager
def opened(file: DataFile) -> Iterator[BinaryIO]:
    """Open a text file and give a stream of its decompressed bytes. Raises UserError if opening or reading fails."""
    try:
        with _bytes(file) as stream:
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError) as error:
        kind = file.compression or (".zip" if file.member else "")
        if not kind:
            raise UserError(Problem(where=str(file), reason=f"cannot be read: {first_line(error)}")) from None
        reason = f"damaged or incomplete {kind} file: {first_line(error)}"
        raise UserError(Problem(where=str(file), reason=reason, fix="copy or compress it again")) from None


@contextmanager
def _bytes(file: DataFile) -> Iterator[BinaryIO]:
    if file.member:
        with zipfile.ZipFile(file.path) as archive, archive.open(file.member) as inner:
            yield cast(BinaryIO, _decompressed(inner, file.compression))
        return
    with file.path.open("rb") as outer:
        yield cast(BinaryIO, _decompressed(outer, file.compression))


def _decompressed(stream: Any, compression: str) -> Any:
    match compression:
        case ".gz":
            return gzip.GzipFile(fileobj=stream)
        case ".bz2":
            return bz2.BZ2File(stream)
        case ".xz":
            return io.BufferedReader(_Xz(stream), 1 << 20)
        case ".zst":
            import pyarrow as pa

            # Python has no Zstandard before 3.14; pyarrow, which is required anyway, has.
            return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd"), 1 << 20)
    return stream


class _Xz(io.RawIOBase):
    """The decompressed bytes of an `.xz` file. Unlike `lzma.LZMAFile`, it takes no dictionary of any size."""

    def __init__(self, stream: BinaryIO):
        self._stream, self._decompressor = stream, lzma.LZMADecompressor(memlimit=MAX_XZ_BYTES)
        self._rest = b""
        """Bytes behind the end of a stream."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read up to `len(buffer)` bytes. Raises LZMAError, EOFError."""
        while True:
            if self._decompressor.eof:
                self._rest = (self._decompressor.unused_data or self._stream.read(io.DEFAULT_BUFFER_SIZE)).lstrip(b"\0")
                if not self._rest:
                    return 0
                self._decompressor = lzma.LZMADecompressor(memlimit=MAX_XZ_BYTES)
            compressed, self._rest = self._rest, b""
            if self._decompressor.needs_input and not compressed:
                compressed = self._stream.read(io.DEFAULT_BUFFER_SIZE)
                if not compressed:
                    raise EOFError("the file ends before the end of its stream")
            if content := self._decompressor.decompress(compressed, len(buffer)):
                buffer[: len(content)] = content
                return len(content)


def members(archive: Path) -> list[str]:
    """Return the sorted names of the files with rows in a zip archive. Raises UserError if the file is no zip archive, or has
    so many files that to open each would take minutes."""
    try:
        with zipfile.ZipFile(archive) as opened_archive:
            names = opened_archive.namelist()
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        reason = f"damaged or incomplete .zip file: {first_line(error)}"
        raise UserError(Problem(where=str(archive), reason=reason, fix="copy or compress it again")) from None
    hidden = ("__MACOSX/", ".")
    of_rows = sorted(
        name
        for name in names
        if is_readable(name) and ending_of(name) in TEXTS and not name.startswith(hidden) and "/." not in name
    )
    if len(of_rows) * len(names) > MAX_ENTRIES_READ:
        reason = f"the archive has {len(names):,} files, all of which are looked up for each of the {len(of_rows):,} with rows"
        raise UserError(Problem(where=str(archive), reason=reason, fix="unpack it, and name its folder"))
    return of_rows
