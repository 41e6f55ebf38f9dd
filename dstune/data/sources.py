"""Read rows from JSONL, JSON, CSV, TSV and Parquet files; a broken line keeps its file and line number."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from dstune.errors import Problem, UserError


@dataclass(frozen=True)
class RawRow:
    """One row of a file as it was found; `fields` is None where the row could not be read, then `error` says why."""

    file: Path
    line: int
    """First line of the row, from 1; in a Parquet file the number of the row."""
    fields: dict[str, Any] | None
    error: str = ""

    @property
    def place(self) -> str:
        return place(self.file, self.line)


def place(file: Path | str, line: int) -> str:
    """`FILE:LINE`, the form in which messages name a row."""
    return f"{file}:{line}"


def expand(spec: str, key: str) -> list[Path]:
    """The files that `spec` (a path, a glob or a `sample://` URI) names, sorted.

    `key` is the configuration key that `spec` came from. Raises UserError if there is no such file, it is empty, or
    its ending names no known format.
    """
    if spec.startswith("sample://"):
        from dstune import samples

        return [samples.resolve(spec, fetch=False)]
    path = Path(spec).expanduser()
    if path.exists():
        files = [path]
    else:
        files = sorted(Path(found) for found in glob.glob(str(path), recursive=True))
    if not files:
        wildcard = glob.has_magic(spec)
        raise UserError(
            Problem(
                where=key,
                value=spec,
                reason="no file matches" if wildcard else "no such file",
                fix="give a JSONL, JSON, CSV, TSV or Parquet file, a glob, or a sample such as sample://chitchat",
            )
        )
    problems = [problem for file in files if (problem := _unreadable(file, key, spec))]
    if problems:
        raise UserError(problems)
    return files


def _unreadable(file: Path, key: str, spec: str) -> Problem | None:
    if file.is_dir():
        advice = f"name the files inside, for example {key}='{file}/*.jsonl'"
        return Problem(where=key, value=spec, reason=f"{file} is a folder", fix=advice)
    if file.suffix.lower() not in READERS:
        known = ", ".join(sorted(READERS))
        return Problem(where=key, value=spec, reason=f"{file}: unknown ending {file.suffix!r}", fix=f"known: {known}")
    try:
        with file.open("rb") as stream:
            if not stream.read(1):
                return Problem(
                    where=str(file), reason=f"the file is empty (named by {key})", fix="give a file with rows"
                )
    except OSError as error:
        return Problem(where=key, value=spec, reason=f"{file} cannot be read: {error.strerror}")
    return None


def fingerprint(file: Path) -> str:
    """Digest of the file's bytes and of the ending that chooses its reader (128 bit, hexadecimal)."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest() + file.suffix.lower()


def read(file: Path) -> Iterator[RawRow]:
    """Rows of `file` in order. Raises UserError where the file as a whole is no such file (a broken Parquet file)."""
    return READERS[file.suffix.lower()](file)


def _read_jsonl(file: Path) -> Iterator[RawRow]:
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.isspace() or not raw:
                continue
            try:
                value = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield RawRow(
                    file, number, None, f"not UTF-8: byte {error.start + 1} of the line is {raw[error.start]:#x}"
                )
                continue
            except (json.JSONDecodeError, RecursionError) as error:
                yield RawRow(file, number, None, f"broken JSON: {_short(error)}")
                continue
            yield _object(file, number, value)


def _read_json(file: Path) -> Iterator[RawRow]:
    """An array of objects; a file that does not start with `[` is read as JSONL, which many name `.json`."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(Problem(where=str(file), reason=f"not UTF-8: byte {error.start + 1}")) from None
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(file)
        return
    decoder = json.JSONDecoder()
    position = _skip_space(text, text.index("[") + 1)
    line, counted = 1, 0
    first = True
    # Items are decoded one by one (instead of the array at once) because only so each has a line to be named by.
    while position < len(text) and text[position] != "]":
        if not first:
            if text[position] != ",":
                yield RawRow(
                    file, line + text.count("\n", counted, position), None, "broken JSON: no comma between rows"
                )
                return
            position = _skip_space(text, position + 1)
            if position == len(text):
                break
        first = False
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            yield RawRow(file, getattr(error, "lineno", line), None, f"broken JSON: {_short(error)}")
            return
        yield _object(file, line, value)
        position = _skip_space(text, position)
    if position >= len(text):
        yield RawRow(file, line + text.count("\n", counted), None, "broken JSON: the array is not closed")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _short(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply"


def _object(file: Path, line: int, value: Any) -> RawRow:
    if isinstance(value, dict):
        return RawRow(file, line, value)
    return RawRow(file, line, None, f"a row is a JSON object, this is {_kind(value)}")


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _read_csv(file: Path, delimiter: str = ",") -> Iterator[RawRow]:
    csv.field_size_limit(1 << 30)  # the default of 128 kB is shorter than a long document
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        names: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                values = next(reader, None)
            except (csv.Error, UnicodeDecodeError) as error:
                # The reader cannot find the next row after either, so the rest of the file is lost.
                yield RawRow(file, line, None, f"broken line, reading stops here: {error}")
                return
            if values is None:
                return
            if not values:
                continue
            if names is None:
                names = values
                continue
            if len(values) != len(names):
                yield RawRow(file, line, None, f"{len(values)} fields where the header has {len(names)}")
                continue
            yield RawRow(file, line, dict(zip(names, values, strict=True)))


def _read_tsv(file: Path) -> Iterator[RawRow]:
    return _read_csv(file, delimiter="\t")


def _read_parquet(file: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield RawRow(file, number, fields)
    except (pa.ArrowException, OSError) as error:
        reason = f"no readable Parquet file: {str(error).splitlines()[0]}"
        raise UserError(Problem(where=str(file), reason=reason)) from None


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
"""The reader of a file by its ending."""
