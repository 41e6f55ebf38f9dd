"""Columns that look like content and that the format of the rows does not read: counted, so that a run tells them once."""

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
"""Names of content that a message may have and that no template reads."""


SYNTHETIC = "synthetic"
"""Column with where a row of `dstune synthesize` came from."""

MISSING = object()


class Unread:
    """Counts the columns and keys that the format does not read, row by row. except_for: columns that something else reads."""

    def __init__(self, fmt: str, mapping: Mapping[str, str], except_for: Collection[str] = ()):
        self._form = ROW_FORMATS[fmt]
        self._mapping = mapping
        self._except_for = frozenset(except_for)
        self._watched: dict[tuple[str, ...], list[str]] = {}
        self._read: dict[tuple[str, ...], list[str]] = {}
        self.columns: set[str] = set()
        """All that were met."""
        self.rows: Counter[str] = Counter()
        """By column, the rows in which it holds something that is not read."""

    def add(self, fields: Mapping[str, Any]) -> None:
        names = tuple(fields)
        if names not in self._watched:
            self._watched[names] = self._of(fields)
            self._read[names] = [
                column for column in fields if column in columns_read(self._form, self._mapping, fields)
            ]
        for column in self._watched[names]:
            if holds_something(fields[column]):
                self.rows[column] += 1
        if self._form.conversational:
            for column in self._read[names]:
                self._look_into(column, fields[column])

    def _look_into(self, column: str, messages: Any) -> None:
        """Count what the messages of a column hold beside what is read of them."""
        messages = messages if isinstance(messages, list) else ()
        row_messages = [
            message for message in messages if isinstance(message, dict) and ("role" in message or "from" in message)
        ]
        for key in {
            key for message in row_messages for key in message.keys() & OF_MESSAGES if holds_something(message[key])
        }:
            self.rows[f"{column}[].{key}"] += 1

    def _of(self, fields: Mapping[str, Any]) -> list[str]:
        expanded = self._form().expand(fields)
        self.columns |= expanded.keys()
        if self._form.keeps_columns:  # rewards may read any of them
            return []
        read = columns_read(self._form, self._mapping, expanded) | self._except_for | (fields.keys() - expanded.keys())
        read |= {column for column in fields if any(fields[column] is expanded.get(name, MISSING) for name in read)}
        looks = content_names() | set(self._mapping.values())
        return [column for column in fields if column in looks and column not in read]
