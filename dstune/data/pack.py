"""Best-fit packing: put samples into as few rows of `capacity` tokens as possible. Pure functions."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the row that each sample goes to: int64 [samples], rows numbered from 0.

    Best-fit decreasing (Johnson 1974): samples from the longest to the shortest, each into the row whose free room is
    the smallest that still holds it, else into a new row. The number of rows depends on the lengths only, not on
    their order; samples of equal length go in the order given.

    Example, capacity 10, lengths [3, 6, 4, 5, 2]:

        6 -> row 0 (room 4)
        5 -> row 1 (room 5)
        4 -> row 0 (room 0): 4 fits into rooms 4 and 5, and 4 is the tighter one
        3 -> row 1 (room 2)
        2 -> row 1 (room 0)

    gives [1, 0, 0, 1, 1]: two rows, no position free.

    Samples of one length are placed together and rows with the same room are interchangeable, so the work grows with
    the number of different lengths, not of samples: a million samples take about a second.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if not len(lengths):
        return lengths
    assert lengths.min() >= 1, "a sample without tokens"
    assert lengths.max() <= capacity, "a sample that is longer than a row"
    rows = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    sorted_lengths = lengths[order]
    group_starts = np.flatnonzero(np.diff(sorted_lengths, prepend=0))
    group_ends = np.append(group_starts[1:], len(order))

    started = _StartedRows()
    next_row = 0
    for start, end in zip(group_starts.tolist(), group_ends.tolist(), strict=True):
        length = int(sorted_lengths[start])
        while start < end:
            tightest = started.tightest(length)
            room = capacity if tightest is None else tightest
            # A row that just took one of these samples is the tightest for the next one: fill it before another.
            per_row = room // length
            needed_rows = -(-(end - start) // per_row)
            if tightest is None:
                taken = list(range(next_row, next_row + needed_rows))
                next_row += needed_rows
            else:
                taken = started.take(tightest, needed_rows)
            placed = min(end - start, len(taken) * per_row)
            rows[order[start : start + placed]] = np.repeat(taken, per_row)[:placed]
            in_last = placed - (len(taken) - 1) * per_row
            started.add(room - per_row * length, taken[:-1])
            started.add(room - in_last * length, taken[-1:])
            start += placed
    return rows


class _StartedRows:
    """Rows that have room left, by how much."""

    def __init__(self) -> None:
        self._rooms: list[int] = []  # sorted
        self._rows: dict[int, list[int]] = {}

    def tightest(self, length: int) -> int | None:
        """Return the smallest room that holds `length` tokens."""
        at = bisect_left(self._rooms, length)
        return self._rooms[at] if at < len(self._rooms) else None

    def take(self, room: int, count: int) -> list[int]:
        """Return up to `count` rows with this room, which are here no longer."""
        waiting = self._rows[room]
        taken = waiting[-count:]
        del waiting[-len(taken) :]
        if not waiting:
            del self._rows[room], self._rooms[bisect_left(self._rooms, room)]
        return taken

    def add(self, room: int, rows: list[int]) -> None:
        if room and rows:
            if room not in self._rows:
                insort(self._rooms, room)
                self._rows[room] = []
            self._rows[room].extend(rows)


def group(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group samples by row: return the sorted samples, and where each row starts: (int64 [samples], int64 [rows + 1]).

    Row r holds `samples[starts[r]:starts[r + 1]]`.
    """
    samples = np.argsort(rows, kind="stable")
    count = int(rows.max()) + 1 if len(rows) else 0
    starts = np.searchsorted(rows[samples], np.arange(count + 1))
    return samples, starts
