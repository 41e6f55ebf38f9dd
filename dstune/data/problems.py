"""What is wrong with a row."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


class RowError(ValueError):
    """This row cannot be used; the text says why."""


def format_value(value: Any) -> str:
    """A value in a message: short, and a word where there is none."""
    return "empty" if value is None or value == "" else f"{value!r:.60}"


def listing(columns: Collection[str]) -> str:
    """Column names for a message, the first twelve of them."""
    found = [repr(column) for column in list(columns)[:12]]
    return ", ".join(found) + (", ..." if len(columns) > 12 else "")
