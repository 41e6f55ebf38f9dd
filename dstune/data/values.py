"""Check single values of a row. Each function returns the value as the normalised row holds it, or raises RowError."""

from __future__ import annotations

import contextlib
import json
import math
import re
from typing import Any

from dstune.core.parsing import parse_json
from dstune.data.problems import RowError, format_value

_LIST_OF_PYTHON = re.compile(r"\[(['\"]|-?\d).*\]\s*", re.DOTALL)
"""A list as Python and numpy print it, and pandas writes it into CSV files."""

_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*(["'])(?:role|from|content|value)\1\s*:""")
"""The beginning of messages that are written as text, by JSON or (with single quotes) by Python."""


def text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"column {column!r} must be text, it is {type(value).__name__}")
    if not value.strip():
        raise RowError(f"column {column!r} is empty")
    return value


def text_or_messages(value: Any, column: str) -> Any:
    value = messages_in(value, column)
    if isinstance(value, list):
        return value
    if not isinstance(value, str):
        raise RowError(f"column {column!r} must be text or a list of messages, it is {type(value).__name__}")
    return text(value, column)


def text_or_texts(value: Any, column: str) -> str | list[str]:
    """Return a text, or a list of texts (perhaps empty), which may be JSON text as in a CSV file."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            value = parse_json(value)
    if not isinstance(value, list):
        return text(value, column)
    return [text(item, column) for item in value]


def messages_in(value: Any, column: str) -> Any:
    """Return the messages that `value` holds as JSON text, the only form in a CSV file; any other value unchanged.

    Raises RowError for messages that Python's `str` wrote.
    """
    match = _MESSAGES.match(value) if isinstance(value, str) else None
    if match is None:
        return value
    if match[1] == "'":
        raise RowError(f"column {column!r} is a list that is not JSON: {format_value(value)}; json.dumps writes it")
    try:
        inner = parse_json(value)
    except ValueError:
        return value
    messages = inner if isinstance(inner, list) else [inner]
    are_messages = all(isinstance(item, dict) and not item.keys().isdisjoint(("role", "from")) for item in messages)
    return messages if are_messages else value


def label(value: Any, column: str) -> str:
    if isinstance(value, list):
        if len(value) == 1:
            return label(value[0], column)
        several = f"column {column!r} has {len(value)} labels ({format_value(value)})"
        raise RowError(f"{several}; task.multi_label=true trains on any number of them")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of integers with missing values is read as floats
    if isinstance(value, str):
        value = value.strip()
    if not isinstance(value, (int, str)) or value == "":
        raise RowError(f"column {column!r} must be a label (text or an integer), it is {format_value(value)}")
    return str(value)


def number(value: Any, column: str) -> float:
    try:
        parsed = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        parsed = math.nan
    if not math.isfinite(parsed):
        raise RowError(f"column {column!r} must be a number, it is {format_value(value)}")
    return parsed


def labels_of_row(value: Any, column: str) -> list[str]:
    """Return the sorted labels of a list, of a JSON list, or of names separated by commas, as in a CSV file."""
    if isinstance(value, str):
        if value.strip().startswith("["):
            try:
                value = parse_json(value)
            except ValueError as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise RowError(f"column {column!r} starts as a list but is not JSON: {reason}") from None
        else:
            value = [name for name in value.split(",") if name.strip()]
    elif isinstance(value, (int, float)):
        value = [value]
    if not isinstance(value, list):
        raise RowError(f"column {column!r} must be a list of labels, it is {format_value(value)}")
    return sorted({label(item, column) for item in value})


def listed(value: Any, column: str) -> list[Any]:
    """Return a list that is not empty: given as a list, a JSON list, or words separated by spaces, as in a CSV file."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            value = parse_json(value)
    if isinstance(value, str) and _LIST_OF_PYTHON.fullmatch(value.lstrip()):
        raise RowError(f"column {column!r} is a list that is not JSON: {format_value(value)}; json.dumps writes it")
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, list):
        raise RowError(f"column {column!r} must be a list, it is {format_value(value)}")
    if not value:
        raise RowError(f"column {column!r} is empty")
    return value


def words(value: Any, column: str) -> list[str]:
    entries = listed(value, column)
    for number, word in enumerate(entries, start=1):
        if not isinstance(word, str) or not word.strip():
            raise RowError(f"word {number} of column {column!r} must be text, it is {format_value(word)}")
    return entries
