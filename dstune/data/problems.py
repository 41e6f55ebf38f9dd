"""What is wrong with a row."""

from __future__ import annotations

from typing import Any


class RowError(ValueError):
    """This row cannot be used; the text says why."""


def format_value(value: Any) -> str:
    """A value in a message: short, and a word where there is none."""
    return "empty" if value is None or value == "" else f"{value!r:.60}"
