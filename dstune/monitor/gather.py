"""Gathers both sides of a check: rows of the run or of a file, and live conversations within a time window."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError
from dstune.monitor import model_signals
from dstune.monitor import signals as reading
from dstune.monitor.check import REFERENCE
from dstune.monitor.conversations import Conversation, one_per, sampled
from dstune.monitor.row_files import CLOCK_SKEW, read_file_rows, read_run_rows, redact_conversations
from dstune.monitor.server_logs import log_folder, read_log
from dstune.monitor.signals import SignalTable
from dstune.protocols import task_of

UNITS = {"h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
VALIDATION = "validation rows"
WINDOW_BEFORE = "the window before"


@dataclass(frozen=True)
class Live:
    """The live side of a check."""

    rows: list[Conversation]
    earlier: list[Conversation]
    """Conversations of the previous window."""
    begin: float | None
    end: float | None
    from_server: bool
    """Whether the rows are a server's logs. Their retention is limited, so none of their text is written anywhere."""
    versions: list[str] = field(default_factory=list)
    largest_user: float = 0.0
    """The largest share of the conversations that comes from one user."""
    left_out: int = 0
    """Rows of `--data` that were not used: the oldest if there is a window, else all outside a sample."""
    ahead_of_now: int = 0
    """Rows of `--data` that were left out of the window because their time is ahead of now."""


@dataclass(frozen=True)
class Reference:
    """The side that live rows are compared with."""

    rows: list[Conversation]
    validation: list[Conversation]
    """Rows that the model was not trained on."""
    config: RunConfig | None
    name: str = REFERENCE
    left_out: int = 0
    """Rows of `--reference` outside the sample."""


def window_seconds(text: str) -> float:
    """Return a window such as `7d`, `12h` or `2w` in seconds. Raises UserError."""
    match = re.fullmatch(r"(\d{1,4})([hdw])", text)
    if match is None or not int(match[1]):
        raise UserError(
            Problem("--window", "is not a length of time", "give a number of hours, days or weeks: 12h, 7d, 2w", text)
        )
    return int(match[1]) * UNITS[match[2]]


def read_live(
    spec: str, window: str | None, config: RunConfig | None, *, store: str | None, per: str | None, most: int
) -> Live:
    """Return the conversations of the window and of the previous one. per: `user` or `key`, to take one conversation of each. most:
    the most conversations of a window. Raises UserError."""
    folder = log_folder(spec)
    seconds = window_seconds(window or "7d") if window or folder is not None else None
    left_out = ahead_of_now = 0
    if folder is not None:
        assert seconds is not None
        end: float | None = time.time()
        rows = read_log(folder, time.time() - 2 * seconds, store)
    else:
        read = read_file_rows(spec, "--data", config, newest=seconds is not None)
        rows, left_out, ahead_of_now = read.rows, read.left_out, read.ahead_of_now
        times = [row.time for row in rows if row.time is not None]
        end = max((moment for moment in times if moment <= time.time() + CLOCK_SKEW), default=None)
        if seconds is not None and len(times) < len(rows):
            reason = "there are rows without a time"
            fix = "add a column created, time, timestamp or date; or leave --window out to compare all rows"
            raise UserError(Problem("--window", reason, fix, str(window)))
    begin = None if seconds is None or end is None else end - seconds
    inside = [row for row in rows if begin is None or (row.time or 0.0) >= begin]
    earlier = [
        row
        for row in rows
        if begin is not None and seconds is not None and begin - seconds <= (row.time or 0.0) < begin
    ]
    if not inside:
        reason = "no conversation in this window"
        if ahead_of_now:
            reason += f": {ahead_of_now:,} row{'s have' if ahead_of_now > 1 else ' has'} a time ahead of now"
        raise UserError(Problem("--data", reason, "--window with a longer time, or other rows", spec))
    users = Counter(row.user for row in inside if row.user is not None)
    largest = max(users.values(), default=0) / len(inside)
    if per is not None:
        inside, earlier = one_per(inside, per), one_per(earlier, per)
    versions = sorted({row.version for row in inside if row.version})
    return Live(
        sampled(inside, most),
        sampled(earlier, most),
        begin,
        end,
        folder is not None,
        versions,
        largest_user=largest,
        left_out=left_out,
        ahead_of_now=ahead_of_now,
    )


def read_reference(run: Path | None, spec: str | None, most: int, *, mask: bool) -> Reference:
    """Return the rows of a run, or those that `--reference` names. mask: mask personal data as the server does in its logs. Raises
    UserError."""
    from dstune.config.run_file import read_run
    from dstune.config.trust import Use

    if spec is not None:
        config = None if run is None else read_run(run / "run.yaml", use=Use.rows).config
        read = read_file_rows(spec, "--reference", config)
        rows = sampled(read.rows, most)
        reference = Reference(rows, rows, config, f"rows of {spec}", read.left_out)
    else:
        assert run is not None
        run_rows = read_run_rows(run, most)
        validation = sampled(run_rows.validation, most)
        # Training rows fill up the rest: they come from the same distribution.
        train = sampled(run_rows.train, max(most - len(validation), 0))
        reference = Reference([*validation, *train], validation, run_rows.config)
    if not mask:
        return reference
    rows = [*redact_conversations(reference.rows)]
    count = len(reference.validation)
    return replace(reference, rows=rows, validation=rows[:count])


def gather_signals(reference: Reference, live: Live, run: Path | None, model_rows: int) -> SignalTable:
    """Return the signals other than the embeddings. model_rows: how many rows of each side the model answers; 0 for none."""
    table = SignalTable()
    reading.add_text_signals(table, reference.rows, live.rows, reference.name)
    labels = reading.labels(reference.rows), reading.labels(live.rows)
    if any((side != "").any() for side in labels):
        table.add("label", reference.name, *labels)
    reading.add_outcomes(table, live.earlier, live.rows, WINDOW_BEFORE)
    if run is not None and reference.config is not None and model_rows:
        _add_model_signals(table, reference, live.rows, run, model_rows)
    return table


def _add_model_signals(
    table: SignalTable, reference: Reference, live: Sequence[Conversation], run: Path, model_rows: int
) -> None:
    assert reference.config is not None
    held_out = sampled(reference.validation, model_rows)
    sample, labelled = _sample_rows_for_model(live, model_rows, with_loss=not task_of(reference.config.task).generates)
    measured = sorted({*sample, *labelled})
    try:
        conversations = [*held_out, *(live[index] for index in measured)]
        values_by_signal = model_signals.measure(run, reference.config, conversations)
    except UserError as error:
        table.unmeasured["model"] = error.problems[0].reason
        return
    for name, values in values_by_signal.items():
        missing_value: Any = "" if values.dtype.kind == "U" else np.nan
        live_values = np.full(len(live), missing_value, dtype=values.dtype)
        live_values[measured] = values[len(held_out) :]
        if name != "loss":
            live_values[np.setdiff1d(measured, sample)] = missing_value
        table.add(name, VALIDATION, values[: len(held_out)], live_values)


def _sample_rows_for_model(live: Sequence[Conversation], most: int, *, with_loss: bool) -> tuple[list[int], list[int]]:
    """Return the indices of a sample of all rows, and of a sample of the labelled rows. Only the loss is measured on the latter:
    labelled rows often differ from the rest."""
    order = sorted(range(len(live)), key=lambda number: (live[number].digest, number))
    labelled = [number for number in order if live[number].label is not None] if with_loss else []
    return order[:most], labelled[:most]
