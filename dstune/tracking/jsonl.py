"""Append-only files with one JSON object per line, which survive a crash and can be rewound to a step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstune.core import files
from dstune.core.disk import is_disk_full
from dstune.core.parsing import parse_json


class JsonLines:
    """A file of rows that carry a `step`. Rows reach the kernel one by one, so a killed process loses none.

    Rows that do not fit on the disk are written with the next row, so a full disk does not stop a training.

    keep_until: the step up to which (inclusive) an existing file is kept; None starts a new file. Later rows come from an earlier
    launch after its last checkpoint: the resumed run writes them again.
    """

    def __init__(self, path: Path, *, keep_until: int | None):
        if path.exists():
            rewind(path, -1 if keep_until is None else keep_until)
        self._path, self._stream = path, files.append(path)
        self._waiting = b""

    def append(self, row: Mapping[str, Any]) -> None:
        self._waiting += json_text(row, ensure_ascii=False).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not is_disk_full(error):
                raise

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`, to which the run has gone back."""
        self.close()
        rewind(self._path, step)
        self._stream = files.append(self._path)

    def close(self) -> None:
        """Close the file. Raises OSError if rows remain that the disk does not take. Closing again does nothing."""
        if not self._stream.closed:
            with self._stream:
                self._write()

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._stream.write(self._waiting) :]


def rewind(path: Path, step: int) -> None:
    """Drop the rows after `step` and a torn last line, in a new file that then takes the old one's place.

    Raises UserError where there are rows to keep and the file is a link, or none.
    """
    lines = files.read_plain(path).splitlines(keepends=True) if step >= 0 else []
    kept_lines = [line for line in lines if _is_row_until(line, step)]
    files.write(path, b"".join(kept_lines), sync=True)


def rows_of(path: Path, step: int) -> list[dict[str, Any]]:
    """Return the rows of `step` in a file that `JsonLines` has opened."""
    rows = map(json.loads, path.read_bytes().splitlines())
    return [row for row in rows if row["step"] == step]


def _is_row_until(line: bytes, step: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        row_step = parse_json(line)["step"]
        return type(row_step) is int and row_step <= step
    except (ValueError, KeyError, TypeError):
        # A crash of the machine can leave a block of zeros in place of the last line.
        return False


def json_text(value: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """Return `value` as JSON that other programs can read; `json.dumps` alone would write NaN."""
    return json.dumps(plain(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def plain(value: Any) -> Any:
    """Return `value` in JSON's types: numpy and torch scalars become numbers, numbers that are not finite None (JSON has no
    NaN)."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
