"""Reads conversations from rows: those of a run's training and evaluation, and those of files and tables."""

from __future__ import annotations

import datetime
import hashlib
import heapq
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dstune.config.data_schema import DataConfig
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError
from dstune.data.run_rows import read_run_parts
from dstune.monitor.conversations import TURNS, Conversation, asked_texts, continued, join_request

TIMES = ("created", "created_at", "time", "timestamp", "date")
UNITS_OF_TIME = ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3))
"""The least number that is read as nanoseconds, microseconds and milliseconds since the epoch, and how many of them are a second.
Each least number stands for a moment in 1973; smaller numbers are seconds."""
FIRST_TIME, END_OF_TIME = -62_135_596_800.0, 253_402_300_800.0
"""The years 1 to 9999, in seconds since the epoch."""
USERS = ("user", "user_hash", "user_id")
CONVERSATIONS = ("conversation", "conversation_id", "thread_id", "session_id")
"""Columns that group rows into conversations."""
ANSWERS = ("label", "labels", "tags", "answers", "score", "completion", "target")
READ_ROWS = 200_000
"""The most conversations of `--data` or `--reference` that are held at once; a sample of them is compared."""
CLOCK_SKEW = 86_400.0
"""Seconds by which a row's time may be ahead of now: clocks differ, and times without a zone are read as UTC."""


@dataclass(frozen=True)
class RunRows:
    """The rows of a run as conversations, including rows that cleaning removed from training."""

    config: RunConfig
    train: list[Conversation]
    validation: list[Conversation]


@dataclass(frozen=True)
class FileRows:
    """The rows of a file or a table as conversations, in their order."""

    rows: list[Conversation]
    left_out: int = 0
    """Rows of the conversations beyond READ_ROWS."""
    ahead_of_now: int = 0
    """Rows that were left out because their time is ahead of now."""


def read_run_rows(run: Path, most: int) -> RunRows:
    """Return at most `most` rows of each part, those with the lowest hashes. Raises UserError."""
    config, parts = read_run_parts(run, most, fix="give --reference FILE with rows like those of the training")
    return RunRows(config, _conversations(parts.get("train", [])), _conversations(parts.get("validation", [])))


def _conversations(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Conversation]:
    """Return the conversations of rows, each with its place, by the rules for live rows: otherwise the two sides would differ."""
    read = _Reading(newest=False)
    for place, fields in rows:
        if (row := conversation_of_row(fields, place)) is not None:
            read.add(row)
    return read.conversations()


def read_file_rows(spec: str, key: str, config: RunConfig | None = None, *, newest: bool = False) -> FileRows:
    """Read the rows of anything that `data.train` accepts, and join the rows of each conversation.

    Rows belong together if they have the same conversation key. Without one, a request that repeats the previous turns of its user
    continues their conversation, and equal requests count once. Of more than READ_ROWS conversations, a sample of complete ones is
    read, always the same one. key: the option that has `spec`, for messages. config: that of a run with the same columns and task.
    newest: of more than READ_ROWS conversations, read those that began last, and leave out rows whose time is ahead of now; rows
    without a time are included. Raises UserError.
    """
    from dstune.data import sources

    data = DataConfig() if config is None else config.data
    read, ahead_of_now = _Reading(newest=newest), 0
    latest = time.time() + CLOCK_SKEW
    for file in sources.expand(spec, key, split="train", text_rows=data.text_rows):
        for raw in sources.read(file):
            if raw.fields is None:
                continue
            fields = {role: raw.fields[column] for role, column in data.columns.items() if column in raw.fields}
            row = conversation_of_row({**raw.fields, **fields}, raw.place)
            if row is None:
                continue
            if newest and row.time is not None and row.time > latest:
                ahead_of_now += 1
            else:
                read.add(row)
    rows = read.conversations()
    if not rows and not ahead_of_now:
        reason = "none of its rows has a question: the columns read are messages, prompt, text, source, question and similar ones"
        raise UserError(Problem(key, reason, "give rows in the form of the run's training rows", spec))
    return FileRows(rows, read.left_out, ahead_of_now)


@dataclass
class _Group:
    """Conversations that are read or left out together: the one of a key, or all of a user that begin with the same text."""

    rank: float
    order: int
    """Number of its first row."""
    conversations: list[Conversation]
    rows: int = 0


class _Reading:
    """Joins rows to conversations while they are read, and holds at most READ_ROWS conversations, all of them complete."""

    def __init__(self, *, newest: bool) -> None:
        self._newest = newest
        self._groups: dict[str, _Group] = {}
        self._least: list[tuple[float, int, str]] = []
        """A heap of the groups, the next one to leave out first."""
        self._left_out: set[bytes] = set()
        """Digests of conversation keys: rows of such a conversation may still follow."""
        self._rows = self._conversations = 0
        self.left_out = 0

    def add(self, row: Conversation) -> None:
        name = _group_name(row)
        group = self._groups.get(name)
        self._rows += 1
        if group is None and row.key is not None and _digest(name) in self._left_out:
            self.left_out += 1
            return
        if group is None:
            group = _Group(_recency(row) if self._newest else _hash_order(name), self._rows, [])
            self._groups[name] = group
            heapq.heappush(self._least, (group.rank, group.order, name))
        group.rows += 1
        before = len(group.conversations)
        _join(group.conversations, row)
        self._conversations += len(group.conversations) - before
        while self._conversations > READ_ROWS and len(self._groups) > 1:
            self._leave_out_a_group()

    def _leave_out_a_group(self) -> None:
        _, _, name = heapq.heappop(self._least)
        group = self._groups.pop(name)
        self._conversations -= len(group.conversations)
        self.left_out += group.rows
        if group.conversations[0].key is not None:
            self._left_out.add(_digest(name))

    def conversations(self) -> list[Conversation]:
        """Return the conversations, in the order of their groups' first rows."""
        return [conversation for group in self._groups.values() for conversation in group.conversations]


def _group_name(row: Conversation) -> str:
    if row.key is not None:
        return f"key {row.key}"
    # Rows of unknown users may come from anybody: only equal ones count as the same request.
    return json.dumps(row.texts if row.user is None else [row.user, row.texts[0]])


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8]


def _recency(row: Conversation) -> float:
    return math.inf if row.time is None else row.time


def _hash_order(name: str) -> float:
    """Return a pseudorandom number that depends only on the group's name."""
    return float(int.from_bytes(_digest(name)[:6]))


def _join(conversations: list[Conversation], row: Conversation) -> None:
    """Add a row to the conversation that it belongs to, or as a new one. conversations: those of its group."""
    if row.key is not None and conversations:
        conversations[0] = _with_row(conversations[0], row)
    else:
        join_request(conversations, row)


def _with_row(earlier: Conversation, row: Conversation) -> Conversation:
    """Return a conversation with its next row, which may repeat all earlier turns, only the last ones (a retry), or none."""
    if row.texts[: len(earlier.texts)] == earlier.texts:
        return continued(earlier, row)
    if earlier.texts[-len(row.texts) :] == row.texts:
        return earlier
    return replace(earlier, texts=(*earlier.texts, *row.texts)[:TURNS])


def conversation_of_row(row: Mapping[str, Any], place: str) -> Conversation | None:
    """Return the conversation of a row; None if the row contains no question."""
    texts = asked_texts(row)
    if not texts:
        return None
    label = row.get("label")
    return Conversation(
        place,
        texts,
        time=_time(_first(row, TIMES)),
        user=_name(_first(row, USERS)),
        key=_name(_first(row, CONVERSATIONS)),
        label=str(label) if isinstance(label, str | int | float) and not isinstance(label, bool) else None,
        correction=row["correction"] if isinstance(row.get("correction"), str) else None,
        rating=float(row["rating"]) if isinstance(row.get("rating"), int | float) else None,
        fields={name: value for name, value in row.items() if name not in ANSWERS},
    )


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _name(value: Any) -> str | None:
    return None if value is None else str(value)


def _time(value: Any) -> float | None:
    """Return a time in seconds since the epoch; None if it is none, or outside of the years 1 to 9999."""
    if isinstance(value, str):
        try:
            value = datetime.datetime.fromisoformat(value)
        except ValueError:
            return None
    if isinstance(value, datetime.datetime):
        seconds = (value if value.tzinfo else value.replace(tzinfo=datetime.UTC)).timestamp()
    elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e20:
        seconds = value / next((per_second for least, per_second in UNITS_OF_TIME if value > least), 1.0)
    else:
        return None
    return seconds if FIRST_TIME <= seconds < END_OF_TIME else None


def redact_conversations(conversations: list[Conversation]) -> Iterator[Conversation]:
    """Yield the conversations with secrets and personal data masked as in a server's logs; otherwise every mask would count as a
    difference."""
    from dstune.data.clean.sensitive import check_personal_data, find_personal_data, find_secrets, mask

    check_personal_data()

    def redact(text: str) -> str:
        masked = mask(text, find_secrets(text))
        return mask(masked, find_personal_data(masked))

    for conversation in conversations:
        yield replace(conversation, texts=tuple(map(redact, conversation.texts)))
