"""The file that `data.order` names: the training rows of every optimizer step, in JSON lines.

    {"epoch": 0, "rows": [17, 4, 102, 9]}

Rows are numbered from 0, in the order of `data.train`. One line is one step; an epoch follows the other, from 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dstune.core.errors import Problem, UserError
from dstune.core.parsing import open_file, parse_json

KEY = "data.order"
LINE_BYTES = 1 << 26
"""Most bytes of a line: a step of four million rows."""


@dataclass(frozen=True)
class WrittenSteps:
    """The rows of all steps: step s has `rows[starts[s]:starts[s + 1]]`."""

    rows: np.ndarray
    """int64 [rows of all steps]."""
    starts: np.ndarray
    """int64 [steps + 1]."""
    first_steps: np.ndarray
    """First step of each epoch, and the number of steps: int64 [epochs + 1]."""
    path: str = ""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def epochs(self) -> int:
        return len(self.first_steps) - 1

    @property
    def longest(self) -> int:
        """Rows of the longest step."""
        return int(np.diff(self.starts).max())

    def steps_in(self, epoch: int) -> int:
        return int(self.first_steps[epoch + 1] - self.first_steps[epoch])

    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of an epoch, and where each of its steps begins among them, with the end: [steps + 1]."""
        bounds = self.starts[self.first_steps[number] : self.first_steps[number + 1] + 1]
        return self.rows[bounds[0] : bounds[-1]], bounds - bounds[0]

    def too_short(self, content: str, fix: str) -> UserError:
        return UserError(
            Problem(KEY, f"the file has {content}, and the run is longer", f"{fix}, or a longer file", self.path)
        )


def write_order(path: Path, epochs: Iterable[Iterable[Iterable[int]]]) -> None:
    """Write the rows of each step of each epoch into a new file. Raises OSError."""
    with path.open("x", encoding="utf-8") as stream:
        for epoch, steps in enumerate(epochs):
            stream.writelines(json.dumps({"epoch": epoch, "rows": list(rows)}) + "\n" for rows in steps)


def read_order(path: str, row_count: int, most_rows: int) -> WrittenSteps:
    """Read the file.

    row_count: rows of `data.train`. most_rows: rows of a step (`trainer.global_batch_size`).
    Raises UserError with the line that is wrong.
    """
    rows: list[np.ndarray] = []
    epochs: list[int] = []
    try:
        with open_file(Path(path)) as stream:
            for number, line in enumerate(iter(lambda: stream.readline(LINE_BYTES + 1), b""), start=1):
                epoch, step_rows = _step(line, f"{path}:{number}")
                last = epochs[-1] if epochs else -1
                if epoch not in ({0} if last < 0 else {last, last + 1}):
                    raise _wrong(
                        f"epoch {epoch} follows epoch {last}" if epochs else "the first epoch is 0", f"{path}:{number}"
                    )
                if (outside := step_rows[(step_rows < 0) | (step_rows >= row_count)]).size:
                    raise _wrong(
                        f"there is no row {outside[0]}: {row_count:,} rows are trained, from 0", f"{path}:{number}"
                    )
                if len(step_rows) > most_rows:
                    reason = f"a step of {len(step_rows)} rows, where trainer.global_batch_size is {most_rows}"
                    raise _wrong(reason, f"{path}:{number}")
                epochs.append(epoch)
                rows.append(step_rows)
    except OSError as error:
        raise UserError(Problem(KEY, f"cannot be read: {error.strerror}", "give a file of JSON lines", path)) from None
    if not rows:
        raise UserError(Problem(KEY, "the file is empty", 'a line for each step, {"epoch": 0, "rows": [0, 1]}', path))
    starts = np.concatenate([[0], np.cumsum([len(step_rows) for step_rows in rows])])
    first_steps = np.searchsorted(np.asarray(epochs), np.arange(epochs[-1] + 2))
    return WrittenSteps(np.concatenate(rows), starts, first_steps, path)


def _step(line: bytes, place: str) -> tuple[int, np.ndarray]:
    try:
        if len(line) > LINE_BYTES:
            raise ValueError(f"has more than {LINE_BYTES:,} bytes")
        values = parse_json(line)
    except ValueError as error:
        raise _wrong(f"this is no JSON: {error}", place) from None
    numbers = values.get("rows") if isinstance(values, dict) and values.keys() == {"epoch", "rows"} else None
    if not isinstance(numbers, list) or not numbers or not all(map(_is_number, [values["epoch"], *numbers])):
        raise _wrong("expected whole numbers: an epoch and one or more rows", place)
    return values["epoch"], np.asarray(numbers, dtype=np.int64)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 62


def _wrong(reason: str, place: str) -> UserError:
    return UserError(Problem(KEY, reason, 'a line for each step, {"epoch": 0, "rows": [0, 1]}', place))
