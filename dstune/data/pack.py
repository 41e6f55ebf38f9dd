"""Best-fit packing: put samples into as few rows of `capacity` tokens as possible. Pure functions."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row that each sample goes to: int64 [samples], rows numbered from 0.

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

    rooms: list[int] = []  # sorted: every amount of free room that some row has
    rows_by_room: dict[int, list[int]] = {}
    next_row = 0

    def leave(room: int, row_list: list[int]) -> None:
        if room and row_list:
            if room not in rows_by_room:
                insort(rooms, room)
                rows_by_room[room] = []
            rows_by_room[room].extend(row_list)

    for start, end in zip(group_starts.tolist(), group_ends.tolist(), strict=True):
        length = int(sorted_lengths[start])
        while start < end:
            tightest = bisect_left(rooms, length)
            room = rooms[tightest] if tightest < len(rooms) else capacity
            # A row that just took one of these samples is the tightest for the next one: fill it before another.
            per_row = room // length
            expected = -(-(end - start) // per_row)
            if tightest < len(rooms):
                waiting = rows_by_room[room]
                taken = waiting[-expected:]
                del waiting[-len(taken) :]
                if not waiting:
                    del rows_by_room[room], rooms[tightest]
            else:
                taken = list(range(next_row, next_row + expected))
                next_row += expected
            placed = min(end - start, len(taken) * per_row)
            rows[order[start : start + placed]] = np.repeat(taken, per_row)[:placed]
            in_last = placed - (len(taken) - 1) * per_row
            leave(room - per_row * length, taken[:-1])
            leave(room - in_last * length, taken[-1:])
            start += placed
    return rows


def group(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Samples sorted by row, and where each row starts: (int64 [samples], int64 [rows + 1]).

    Row r holds `samples[starts[r]:starts[r + 1]]`.
    """
    samples = np.argsort(rows, kind="stable")
    count = int(rows.max()) + 1 if len(rows) else 0
    starts = np.searchsorted(rows[samples], np.arange(count + 1))
    return samples, starts
