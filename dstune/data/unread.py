"""Count columns that look like content but that the rows' format does not read, so that a run reports each once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from dstune.data.content_names import content_names
from dstune.data.formats import columns_read
from dstune.data.media import holds_something
from dstune.protocols import ROW_FORMATS

OF_MESSAGES = frozenset(
    (
        "analysis",
        "chain_of_thought",
        "cot",
        "input",
        "output",
        "prompt",
        "rationale",
        "reasoning_details",
        "reasoning_text",
        "response",
        "text",
        "thought",
        "thoughts",
    )
)
"""Keys of a message that look like content and that no template reads."""


SYNTHETIC = "synthetic"
"""Column in which `dstune synthesize` records a row's origin."""

MISSING = object()


class Unread:
    """Counts the columns and keys with content that the format does not read, row by row.

    mapping: `data.columns`. except_for: columns that something else reads.
    """

    def __init__(self, fmt: str, mapping: Mapping[str, str], except_for: Collection[str] = ()):
        self._form = ROW_FORMATS[fmt]
        self._mapping = mapping
        self._except_for = frozenset(except_for)
        self._watched: dict[tuple[str, ...], list[str]] = {}
        """By the names of a row's columns: those that look like content and are not read."""
        self._read: dict[tuple[str, ...], list[str]] = {}
        """By the names of a row's columns: those that are read."""
        self.columns: set[str] = set()
        """All columns of all rows."""
        self.rows: Counter[str] = Counter()
        """By column (or key of its messages): the number of rows with unread content in it."""

    def add(self, fields: Mapping[str, Any]) -> None:
        """Count the unread content of one row."""
        names = tuple(fields)
        if names not in self._watched:
            self._watched[names] = self._unread_columns(fields)
            self._read[names] = [
                column for column in fields if column in columns_read(self._form, self._mapping, fields)
            ]
        for column in self._watched[names]:
            if holds_something(fields[column]):
                self.rows[column] += 1
        if self._form.conversational:
            for column in self._read[names]:
                self._count_keys_of_messages(column, fields[column])

    def _count_keys_of_messages(self, column: str, messages: Any) -> None:
        """Count the unread keys with content in the messages of a column."""
        messages = messages if isinstance(messages, list) else ()
        row_messages = [
            message for message in messages if isinstance(message, dict) and ("role" in message or "from" in message)
        ]
        for key in {
            key for message in row_messages for key in message.keys() & OF_MESSAGES if holds_something(message[key])
        }:
            self.rows[f"{column}[].{key}"] += 1

    def _unread_columns(self, fields: Mapping[str, Any]) -> list[str]:
        """Return the columns of a row that look like content and are not read."""
        expanded = self._form().expand(fields)
        self.columns |= expanded.keys()
        if self._form.keeps_columns:  # rewards may read any of them
            return []
        read = columns_read(self._form, self._mapping, expanded) | self._except_for | (fields.keys() - expanded.keys())
        read |= {column for column in fields if any(fields[column] is expanded.get(name, MISSING) for name in read)}
        content_columns = content_names() | set(self._mapping.values())
        return [column for column in fields if column in content_columns and column not in read]
