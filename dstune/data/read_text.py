"""Read the rows of JSON, CSV and plain text files; a row that cannot be read keeps its file and line."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from dstune.config.data_schema import TextRows
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import (
    RepeatedKey,
    check_depth,
    end_of_json,
    lines_within,
    parse_json,
    too_deep,
    too_many_digits,
    unique,
)
from dstune.data.files import DataFile, RawRow, opened, place
from dstune.data.problems import listing

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_ROW_BYTES = 2**26
"""A longer row is a bad row: parsing a line of 1 GiB would take many times that memory before anything could refuse it."""
MAX_BLANK_LINES = 2_000_000
"""Consecutive blank lines and comments after which a file is refused: a small compressed file may have any number of them."""
MAX_JSON_BYTES = 2**32
"""Limit of a JSON file that is not JSON Lines: it is read into memory completely."""


class BlankLines:
    """Refuses a file with too many consecutive blank lines."""

    def __init__(self, file: DataFile):
        self._file = file
        self._count = 0

    def count(self, number: int, is_blank: bool) -> None:
        """Count line `number`. Raises UserError if it ends too many blank lines."""
        self._count = self._count + 1 if is_blank else 0
        if self._count > MAX_BLANK_LINES:
            reason = f"there are more than {MAX_BLANK_LINES:,} blank lines before this one"
            raise UserError(Problem(place(self._file, number), reason, "remove them"))


class Lines:
    """The rows of a file with one JSON object a line; blank lines are skipped.

    Reading can start at any line of an uncompressed file: `offset` is the number of bytes before it, `line` the number of lines.
    Both advance while the rows are read, so they always give the start of the next row.
    """

    def __init__(self, file: DataFile, offset: int = 0, line: int = 0):
        self._file = file
        self.offset = offset
        self.line = line

    def __iter__(self) -> Iterator[RawRow]:
        with opened(self._file) as stream:
            if self.offset:
                stream.seek(self.offset)
            blank_lines = BlankLines(self._file)
            for raw, size in lines_within(stream, MAX_ROW_BYTES):
                self.offset += size
                self.line += 1
                row = _too_long(self._file, self.line) if raw is None else _row_of_json(self._file, self.line, raw)
                blank_lines.count(self.line, row is None)
                if row is not None:
                    yield row


def read_jsonl(file: DataFile) -> Iterator[RawRow]:
    """Yield one JSON object a line; blank lines are skipped."""
    return iter(Lines(file))


def _row_of_json(file: DataFile, number: int, raw: bytes) -> RawRow | None:
    """Return the row of a line; None if it is blank."""
    # In errors, the end of the line would count as a column and as the start of another line.
    raw = _line(number, raw)
    if not raw or raw.isspace():
        return None
    text, error = decoded(raw)
    if error:
        return RawRow(file, number, None, error)
    try:
        value = parse_json(text)
    except ValueError as broken:
        return RawRow(file, number, None, _reason(broken))
    return _object(file, number, value)


def _too_long(file: DataFile, number: int) -> RawRow:
    return RawRow(file, number, None, f"the row has more than {MAX_ROW_BYTES >> 20} MiB")


def _line(number: int, raw: bytes) -> bytes:
    """Return a line without its end; the first line also without a byte order mark."""
    return (raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw).rstrip(b"\r\n")


def lines_of(
    file: DataFile, stream: BinaryIO, is_comment: Callable[[bytes], bool] = lambda line: False
) -> Iterator[tuple[int, bytes | None]]:
    """Yield the number (from 1) and the text of each line, without its end; None for a line that is too long for a row.

    is_comment: whether a line is a comment. Raises UserError if too many blank lines and comments follow each other.
    """
    blank_lines = BlankLines(file)
    for number, (raw, _) in enumerate(lines_within(stream, MAX_ROW_BYTES), start=1):
        line = None if raw is None else _line(number, raw)
        blank_lines.count(number, line is not None and (not line.strip() or is_comment(line)))
        yield number, line


def decoded(raw: bytes | None) -> tuple[str, str]:
    """Return the text of a line and an empty reason, or an empty text and the reason that the line cannot be read."""
    if raw is None:
        return "", f"the line has more than {MAX_ROW_BYTES >> 20} MiB"
    try:
        return raw.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        return "", f"not UTF-8: byte {error.start + 1} of the line is {raw[error.start]:#x}"


def read_json(file: DataFile) -> Iterator[RawRow]:
    """Yield the objects of an array, or objects one after the other; many `.json` files have one object a line."""
    with opened(file) as stream:
        content = stream.read(MAX_JSON_BYTES + 1).removeprefix(BYTE_ORDER_MARK)
    if len(content) > MAX_JSON_BYTES:
        reason = f"a JSON file is read as a whole, and this one has more than {MAX_JSON_BYTES >> 30} GiB"
        raise UserError(Problem(where=str(file), reason=reason, fix="one object a line: jq -c '.[]' FILE > NEW.jsonl"))
    start = len(content) - len(content.lstrip(b" \t\r\n"))
    is_array = content[start : start + 1] == b"["
    if not is_array and _first_line_is_whole(content[start:]):
        rows = (_row_of_json(file, number, raw) for number, raw in enumerate(io.BytesIO(content), start=1))
        yield from (row for row in rows if row is not None)
        return
    try:
        text = content.decode("utf-8").rstrip()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        reason = f"not UTF-8: byte {content[error.start]:#x} in line {line}"
        raise UserError(Problem(where=str(file), reason=reason, fix="save it as UTF-8")) from None
    yield from _array(file, text, text.index("[") + 1) if is_array else _objects(file, text)


def _first_line_is_whole(content: bytes) -> bool:
    line = content.split(b"\n", 1)[0]
    try:
        parse_json(line)
    except ValueError:
        # A broken line is one bad row among others, unless it looks like the beginning of an object over several lines.
        return not line.rstrip().endswith((b"{", b"[", b","))
    return True


def _array(file: DataFile, text: str, position: int) -> Iterator[RawRow]:
    # Items are decoded one by one, not the array at once, so that each row has its line number.
    last = text.count("\n") + 1
    lost = f"; the rest of the file, to line {last}, is lost"
    line, counted, first = 1, 0, True
    position = _skip_space(text, position)
    while position < len(text) and text[position] != "]":
        if not first:
            if text[position] != ",":
                line += text.count("\n", counted, position)
                yield RawRow(file, line, None, f"broken JSON: no comma between rows{lost}")
                return
            position = _skip_space(text, position + 1)
            if position == len(text):
                break
        first = False
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, position = _row_at(file, line, text, position)
        except json.JSONDecodeError as error:
            yield RawRow(file, error.lineno, None, f"{_reason(error)}{lost}")
            return
        yield row
        position = _skip_space(text, position)
    if position >= len(text):
        yield RawRow(file, last, None, "broken JSON: the array is not closed")
    elif (position := _skip_space(text, position + 1)) < len(text):
        line += text.count("\n", counted, position)
        yield RawRow(file, line, None, f"broken JSON: there is more after the end of the array{lost}")


def _objects(file: DataFile, text: str) -> Iterator[RawRow]:
    """Yield objects over several lines each, with nothing but white space between them."""
    line, counted, position = 1, 0, _skip_space(text, 0)
    while position < len(text):
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, position = _row_at(file, line, text, position)
        except json.JSONDecodeError as error:
            lost = f"; the rest of the file, to line {text.count(chr(10)) + 1}, is lost"
            yield RawRow(file, error.lineno, None, f"{_reason(error)}{lost}")
            return
        yield row
        position = _skip_space(text, position)


_DECODER = json.JSONDecoder(object_pairs_hook=unique)


def _row_at(file: DataFile, line: int, text: str, start: int) -> tuple[RawRow, int]:
    """Return the row that begins at `start`, and where it ends. Raises JSONDecodeError if its end cannot be found."""
    try:
        value, end = _DECODER.raw_decode(text, start)
        check_depth(text, start, end)
        return _object(file, line, value), end
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        # Nested too deep, a number with too many digits, or a repeated key: the rows after it can be read.
        after = end_of_json(text, start) if text[start] in "[{" else None
        if after is None:
            raise json.JSONDecodeError("Value that cannot be read", text, start) from None
        if not isinstance(error, RepeatedKey):
            error = too_deep() if isinstance(error, RecursionError) or "nested" in str(error) else too_many_digits()
        return RawRow(file, line, None, _reason(error)), after


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
    return f"broken JSON: {error}"


def _object(file: DataFile, line: int, value: Any) -> RawRow:
    if isinstance(value, dict):
        return RawRow(file, line, value)
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return RawRow(file, line, {"messages": value})  # a conversation that is the row itself
    return RawRow(file, line, None, f"a row is a JSON object, this is {_kind(value)}")


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def read_csv(file: DataFile) -> Iterator[RawRow]:
    """Yield the rows below the header line; the header shows the separator. A quoted field may span lines."""
    csv.field_size_limit(MAX_ROW_BYTES)  # the default of 128 kB is shorter than a long document
    with opened(file) as stream:
        lines = _CsvLines(file, stream)
        first = lines.peek()
        reader = csv.reader(lines, delimiter=separator(first), strict=True)
        names: list[str] | None = None
        while True:
            line = lines.number + 1
            try:
                values = next(reader, None)
            except csv.Error as error:
                # The reader starts afresh with the next line, and the lines of the broken row are lost: report them.
                yield RawRow(file, line, None, _broken_csv(error, line, lines.number))
                continue
            if values is None:
                return
            if not values:
                continue
            if names is None:
                names = values
                refuse_doubled(names, f"{file}:{line}")
                continue
            if len(values) != len(names):
                where = "" if lines.number == line else f" (in lines {line} to {lines.number})"
                yield RawRow(file, line, None, f"{len(values)} fields where the header has {len(names)}{where}")
                continue
            if fault := _not_utf8(values):
                yield RawRow(file, line, None, fault)
                continue
            yield RawRow(file, line, dict(zip(names, values, strict=True)))


def refuse_doubled(names: Sequence[str], where: str) -> None:
    """Raise UserError if two columns have the same name: a row would keep only the last one."""
    if doubled := sorted(name for name, count in Counter(names).items() if count > 1):
        reason = f"more than one column is named {listing(doubled)}"
        raise UserError(Problem(where=where, reason=reason, fix="give each column its own name"))


class _CsvLines:
    """The lines of a CSV file for the csv module. A line that is too long for a row raises csv.Error and is skipped; too many
    blank lines raise UserError."""

    def __init__(self, file: DataFile, stream: BinaryIO):
        self._blank_lines = BlankLines(file)
        # Bytes that are not UTF-8 are passed through, so that they spoil only their own row.
        self._text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self._peeked: str | None = None
        self.number = 0
        """Number of the line that was read last, from 1."""

    def peek(self) -> str:
        """Return the first line without consuming it."""
        self._peeked = self._text.readline(MAX_ROW_BYTES)
        return self._peeked

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(MAX_ROW_BYTES) if self._peeked is None else self._peeked
        self._peeked = None
        if not line:
            raise StopIteration
        self.number += 1
        self._blank_lines.count(self.number, line.isspace())
        if len(line) < MAX_ROW_BYTES or line.endswith(("\n", "\r")):
            return line
        while line and not line.endswith(("\n", "\r")):
            line = self._text.readline(MAX_ROW_BYTES)
        raise csv.Error(f"a line of more than {MAX_ROW_BYTES >> 20} MiB")


def separator(header: str) -> str:
    """Return the separator of a CSV file: a comma, or if its header has none outside of quotes, the most frequent of `;`, tab and
    `|`. Spreadsheets write these where a comma is the decimal point."""
    bare = "".join(header.split('"')[::2])
    if "," in bare:
        return ","
    count, most_frequent = max((bare.count(mark), mark) for mark in ";\t|")
    return most_frequent if count else ","


def _broken_csv(error: csv.Error, first: int, last: int) -> str:
    if "unexpected end of data" in str(error):
        reason = "a quote that opens here is never closed"
        return f"broken CSV: {reason}; lines {first} to {last}, the end of the file, are lost"
    if "field larger" in str(error):
        error = csv.Error(f"a field of more than {MAX_ROW_BYTES >> 20} MiB")
    lost = "" if first == last else f"; lines {first} to {last} are lost"
    return f"broken CSV: {error}{lost}"


def _not_utf8(values: list[str]) -> str:
    for value in values:
        if value.isascii():
            continue
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"not UTF-8: byte {ord(value[error.start]) - 0xDC00:#x} after {value[: error.start][-20:]!r}"
    return ""


def read_text(file: DataFile) -> Iterator[RawRow]:
    """Yield plain text as the column `text`: a row is a line, a paragraph (up to a blank line) or the whole document."""
    with opened(file) as stream:
        if file.text_rows is TextRows.line:
            blocks: Iterator[tuple[int, list[bytes | None]]] = (
                (number, [raw]) for number, raw in lines_of(file, stream) if raw is None or raw.strip()
            )
        elif file.text_rows is TextRows.paragraph:
            blocks = _paragraphs(file, stream)
        else:
            blocks = iter([(1, list(_within_a_row(raw for _, raw in lines_of(file, stream))))])
        for number, lines in blocks:
            row = _text_row(file, number, lines)
            if row.fields is None or row.fields["text"]:
                yield row


def _within_a_row(lines: Iterable[bytes | None]) -> Iterator[bytes | None]:
    """Yield the `lines` of one row until they are too long for it together; then yield None once, and skip the remaining ones."""
    total = 0
    for line in lines:
        total += MAX_ROW_BYTES + 1 if line is None else len(line) + 1
        if total <= MAX_ROW_BYTES + 1:
            yield line
        elif line is None or total - len(line) - 1 <= MAX_ROW_BYTES + 1:
            yield None


def _paragraphs(file: DataFile, stream: BinaryIO) -> Iterator[tuple[int, list[bytes | None]]]:
    numbered = lines_of(file, stream)
    for blank, group in itertools.groupby(numbered, key=lambda line: line[1] is not None and not line[1].strip()):
        if not blank:
            first, raw = next(group)
            yield first, list(_within_a_row(itertools.chain([raw], (line for _, line in group))))


def _text_row(file: DataFile, first: int, lines: Sequence[bytes | None]) -> RawRow:
    parts = []
    for number, raw in enumerate(lines, start=first):
        text, error = decoded(raw)
        if error:
            return RawRow(file, number, None, error)
        parts.append(text)
    return RawRow(file, first, {"text": "\n".join(parts).strip("\n")})
