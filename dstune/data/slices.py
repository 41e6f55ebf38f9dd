"""Parse and apply slices of splits in the syntax of `datasets`: `train[:20%]`, `train[100:200]`, `train+validation[-500:]`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dstune.core.errors import Problem, UserError
from dstune.data.files import DataFile, Rows

_PART = r"[\w.-]*(?:\[[^\[\]+]*\])?"
SPLITS = re.compile(rf"{_PART}(?:\+{_PART})*")
"""Matches what may follow the colon of a path: one split or several, each with or without a slice."""

_SLICE = re.compile(r"(?P<name>[\w.-]*)(?:\[(?P<first>-?\d{1,18}%?)?:(?P<last>-?\d{1,18}%?)?\])?")


@dataclass(frozen=True)
class SplitSlice:
    """A slice of a split."""

    name: str
    """Name of the split; empty if none is given."""
    first: str = ""
    last: str = ""
    """The slice [first, last) in rows or, with `%`, in percent; empty for the start or the end of the split."""
    sliced: bool = False
    """Whether brackets were given."""

    def bounds(self, count: int) -> Rows:
        """Return the rows [first, last) of a split with `count` rows. Bounds in percent are rounded to the nearest row."""
        first, last = (_absolute(bound, count) for bound in (self.first or "0", self.last or str(count)))
        return first, max(first, last)


def parse(text: str | None, key: str, spec: str) -> list[SplitSlice]:
    """Return the slices in `text`, the part after the colon of `spec`; if it is None, one complete split without a name.

    key: the configuration key of `spec`. Raises UserError.
    """
    parts = []
    for part in (text or "").split("+"):
        matched = _SLICE.fullmatch(part)
        bounds = [] if matched is None else [bound for bound in (matched["first"], matched["last"]) if bound]
        mixes_units = len({bound.endswith("%") for bound in bounds}) > 1
        exceeds_percent = any(bound.endswith("%") and abs(int(bound[:-1])) > 100 for bound in bounds)
        if matched is None or mixes_units or exceeds_percent:
            reason = f"{part!r} is no slice of a split"
            fix = "NAME[FIRST:LAST] in rows or in percent, for example train[:20%] or train[100:200]+validation"
            raise UserError(Problem(key, reason, fix, spec))
        parts.append(SplitSlice(matched["name"], matched["first"] or "", matched["last"] or "", part.endswith("]")))
    return parts


def apply(
    chosen: SplitSlice, files: Sequence[DataFile], count_rows: Callable[[DataFile], int], key: str, spec: str
) -> list[DataFile]:
    """Return `files`, which form one split, restricted to the slice. Raises UserError if no row remains."""
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
    """Return a bound as a row number in [0, count]; negative bounds count from the end."""
    number = round(int(bound[:-1]) * count / 100) if bound.endswith("%") else int(bound)
    return min(max(number + count, 0) if number < 0 else number, count)
