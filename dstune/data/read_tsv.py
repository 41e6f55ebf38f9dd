"""Read files with tabs between the fields. Quotes may be those of spreadsheets or part of the text, even in the same file."""

from __future__ import annotations

import csv
import io
import logging
from collections import deque
from collections.abc import Iterator

from dstune.data.files import DataFile, RawRow, opened
from dstune.data.read_text import MAX_ROW_BYTES, decoded, lines_of, refuse_doubled

MAX_LINES = 1000
"""Number of lines that a quoted field may span."""

log = logging.getLogger(__name__)

Line = tuple[int, bytes | None]


def read_tsv(file: DataFile) -> Iterator[RawRow]:
    """Yield the rows below the header line.

    A line that begins with `#` and has no tab is a comment, unless there is only one column; a `#` in front of the header is
    removed. A quoted field may contain tabs and span lines; a quote that is not closed within the row is text.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    with opened(file) as stream:
        lines = _Ahead(lines_of(file, stream, lambda line: line.startswith(b"#") and b"\t" not in line))
        names: list[str] | None = None
        comments = 0
        for number, raw in lines:
            text, fault = decoded(raw)
            if fault:
                yield RawRow(file, number, None, fault)
                continue
            if not text:
                continue
            if text.startswith("#") and "\t" not in text and (names is None or len(names) > 1):
                comments += 1
                continue
            fields = text.split("\t")
            if names is None:
                names = [_unquoted(name) for name in (text.removeprefix("#").lstrip(" ").split("\t"))]
                refuse_doubled(names, f"{file}:{number}")
                continue
            if len(fields) != len(names) or _opens_quote(fields[-1]):
                fields = lines.quoted_row(text, len(names)) or fields
            if len(fields) != len(names):
                yield RawRow(file, number, None, f"{len(fields)} fields where the header has {len(names)}")
                continue
            yield RawRow(file, number, dict(zip(names, map(_unquoted, fields), strict=True)))
        if comments:
            log.info("%s: %d comment line%s passed over", file, comments, "s" * (comments > 1))


class _Ahead:
    """Numbered lines with a look-ahead."""

    def __init__(self, lines: Iterator[Line]):
        self._lines = lines
        self._peeked: deque[Line] = deque()

    def __iter__(self) -> Iterator[Line]:
        while True:
            line = self._peeked.popleft() if self._peeked else next(self._lines, None)
            if line is None:
                return
            yield line

    def quoted_row(self, text: str, width: int) -> list[str] | None:
        """Return the fields, still quoted, of the row that begins with the line `text`, and consume its further lines; None if
        quotes do not make it a row of `width` fields.

        If the line is a row even when its quotes are text, the following line must not look like a row.
        """
        quotes, parts, is_row = text.count('"'), [text], text.count("\t") == width - 1
        while quotes % 2:
            following = self._peek(len(parts) - 1)
            if following is None or len(parts) == MAX_LINES:
                return None
            if is_row and following.count("\t") == width - 1 > 0:
                return None
            quotes += following.count('"')
            parts.append(following)
        try:
            rows = list(csv.reader(io.StringIO("\n".join(parts), newline=""), delimiter="\t", strict=True))
        except csv.Error:
            return None
        if len(rows) != 1 or len(rows[0]) != width:
            return None
        for _ in parts[1:]:
            self._peeked.popleft()
        return [_quoted(field) for field in rows[0]]

    def _peek(self, index: int) -> str | None:
        """Return the line `index` lines after the next one; None if there is none, or it cannot be decoded."""
        while len(self._peeked) <= index:
            line = next(self._lines, None)
            if line is None:
                return None
            self._peeked.append(line)
        text, fault = decoded(self._peeked[index][1])
        return None if fault else text


def _opens_quote(field: str) -> bool:
    return field.startswith('"') and field.count('"') % 2 == 1


def _quoted(field: str) -> str:
    return '"' + field.replace('"', '""') + '"'


def _unquoted(field: str) -> str:
    """Return the text of a field in quotes; a field whose quotes are text stays as it is."""
    inner = field[1:-1]
    is_quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if is_quoted else field
