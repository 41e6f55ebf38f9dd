"""Slices of splits as `datasets` writes them: `train[:20%]`, `train[100:200]`, `train+validation[-500:]`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dstune.core.errors import Problem, UserError
from dstune.data.files import DataFile, Rows

_PART = r"[\w.-]*(?:\[[^\[\]+]*\])?"
SPLITS = re.compile(rf"{_PART}(?:\+{_PART})*")
"""What stands behind the colon of a path: one split or several, each with a slice or without."""

_SLICE = re.compile(r"(?P<name>[\w.-]*)(?:\[(?P<first>-?\d{1,18}%?)?:(?P<last>-?\d{1,18}%?)?\])?")


@dataclass(frozen=True)
class SplitSlice:
    """Some rows of a split."""

    name: str
    """Of the split; empty where none is given."""
    first: str = ""
    last: str = ""
    """The first row and the one behind the last, in rows or (with `%`) in percent; empty at the start and end of the split."""
    sliced: bool = False

    def bounds(self, count: int) -> Rows:
        """Return the numbers [first, last) of the rows, of `count`. Bounds in percent are rounded to the nearest row."""
        first, last = (_absolute(bound, count) for bound in (self.first or "0", self.last or str(count)))
        return first, max(first, last)


def parse(text: str | None, key: str, spec: str) -> list[SplitSlice]:
    """Return the slices that `text` names, behind the colon of `spec`; one nameless whole split where it is None. Raises
    UserError."""
    parts = []
    for part in (text or "").split("+"):
        matched = _SLICE.fullmatch(part)
        bounds = [] if matched is None else [bound for bound in (matched["first"], matched["last"]) if bound]
        mixed = len({bound.endswith("%") for bound in bounds}) > 1
        beyond = any(bound.endswith("%") and abs(int(bound[:-1])) > 100 for bound in bounds)
        if matched is None or mixed or beyond:
            reason = f"{part!r} is no slice of a split"
            fix = "NAME[FIRST:LAST] in rows or in percent, for example train[:20%] or train[100:200]+validation"
            raise UserError(Problem(key, reason, fix, spec))
        parts.append(SplitSlice(matched["name"], matched["first"] or "", matched["last"] or "", part.endswith("]")))
    return parts


def apply(
    chosen: SplitSlice, files: Sequence[DataFile], count_rows: Callable[[DataFile], int], key: str, spec: str
) -> list[DataFile]:
    """Return `files`, which are one split, without the rows outside of the slice. Raises UserError where no row is left."""
    if not chosen.sliced:
        return list(files)
    counts = [count_rows(file) for file in files]
    first, last = chosen.bounds(sum(counts))
    chosen_files, rows_before = [], 0
    for file, count in zip(files, counts, strict=True):
        rows = max(first - rows_before, 0), min(last - rows_before, count)
        if rows[0] < rows[1]:
            chosen_files.append(file if rows == (0, count) else replace(file, rows=rows))
        rows_before += count
    if not chosen_files:
        reason = f"the slice holds none of the {rows_before:,} rows"
        raise UserError(Problem(key, reason, "NAME[FIRST:LAST], for example train[:20%]", spec))
    return chosen_files


def _absolute(bound: str, count: int) -> int:
    number = round(int(bound[:-1]) * count / 100) if bound.endswith("%") else int(bound)
    return min(max(number + count, 0) if number < 0 else number, count)
