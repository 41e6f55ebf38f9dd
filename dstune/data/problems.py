"""Describe what is wrong with a row."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

NO_TOWER = "sees none: it has no tower for them"
"""Part of the reason if rows with images meet a model without vision: the rows may be fine for another model."""


class RowError(ValueError):
    """This row cannot be used; the text says why."""


def format_value(value: Any) -> str:
    """Return a value as it appears in a message: shortened, and `empty` if there is none."""
    return "empty" if value is None or value == "" else f"{value!r:.60}"


def listing(columns: Collection[str]) -> str:
    """Return column names as they appear in a message: the first twelve."""
    quoted_columns = [repr(column) for column in list(columns)[:12]]
    return ", ".join(quoted_columns) + (", ..." if len(columns) > 12 else "")


def unprinted(fields: str, fix: str) -> str:
    """Return the reason for refusing a row with `fields` that the chat template never prints."""
    return f"the chat template does not print {fields}, which this row has; {fix}"


_UNPRINTED = re.compile(r"the chat template does not print (.+?), which this row has; (.+)", re.DOTALL)


def unprinted_in(reason: str) -> tuple[str, str] | None:
    """Return the fields and the fix in a reason made by `unprinted`, which is about the template, not the row; otherwise None."""
    match = _UNPRINTED.fullmatch(reason)
    return (match.group(1), match.group(2)) if match else None
