"""Normalise each row to one shape, or refuse it with a reason."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from dstune.data import media
from dstune.data.formats import check_columns, check_task, column_of, columns_read, recognise
from dstune.data.images.places import COLUMN, for_hash, with_images
from dstune.data.message import joined
from dstune.data.problems import RowError, listing
from dstune.data.split import content_hash
from dstune.protocols import ROW_FORMATS, task_of
from dstune.protocols.task import TaskConfig

__all__ = [
    "RowError",
    "canonical_json",
    "check_columns",
    "check_task",
    "hash_of",
    "json_text",
    "labels_of",
    "normalise",
    "recognise",
    "sort_labels",
    "with_joined_parts",
]


SEES_NONE = "reads none (task=chat and task=preference do)"
"""Follows the name of a task that does not read images, in the reason for refusing rows with images."""

CONVERSATIONS = frozenset({"messages", "prompt", "chosen", "rejected"})
"""Keys of a normalised row that may hold messages."""


def normalise(
    fields: Mapping[str, Any],
    fmt: str,
    mapping: Mapping[str, str],
    task: TaskConfig | None = None,
    *,
    input_apart: bool = False,
    answered: bool = True,
) -> dict[str, Any]:
    """Return the row in the shape that the remaining code reads; columns that the format does not know are dropped.

    Keys, by format:

    - `messages`, with `tools` if the row has any; `prompt` and `completion`; `source` and `target`; `text`
    - `text`, with `text_pair` if there is one, and `label` (a string, in a regression a number) or `labels` (of a multi-label
      task: sorted strings, perhaps none)
    - `tokens` and `tags`: equally many strings
    - `question`, `context` and `answers`, each with `text` and `start`
    - pairs of answers: see `preferences.pair_row`; a judged answer is a chat row with `desirable` (true or false)

    task: decides what is allowed, for example an assistant that says nothing. input_apart: whether an Alpaca row's `input`
    stays a separate key next to the instruction, for a template that has a place for it. answered: if False, the roles in the
    format's `answers` are None.
    Raises RowError.
    """
    form = ROW_FORMATS[fmt]()
    form.input_apart = input_apart
    member = None if task is None else task_of(task)
    values: dict[str, Any] = {}
    fields = form.expand(fields)
    for role in (*form.required, *form.optional):
        if role in form.answers and not answered:
            values[role] = None
            continue
        column = column_of(type(form), role, mapping, fields)
        if column not in fields and role in form.required:
            raise RowError(f"missing column {column!r}, the columns here are {listing(fields)}")
        value = fields.get(column)
        if role in form.required or value is not None:
            check = form.check_of(role, member)
            values[role] = check(value, column) if check else value
    if form.conversational and not media.COLUMNS.keys().isdisjoint(fields):
        media.refuse_columns(fields, used=columns_read(type(form), mapping, fields))
    if form.conversational and fields.get("continue_final_message"):
        raise RowError("continue_final_message: an answer that is begun is not trained; give the message as a whole")
    row = form.row(values, member)
    if form.conversational:
        sees = "" if member is None or member.sees_images else f"task={member.name} {SEES_NONE}"
        row = with_images(row, values.get(COLUMN), sees=sees)
        if COLUMN not in row:  # in a row with images, a marker may be text
            media.refuse_markers(row)
    return row


def json_text(row: Mapping[str, Any]) -> str:
    """Return the row as JSON text, with its own keys sorted.

    Keys inside the values keep their order: templates print the schemas and calls of tools in the order of their keys.
    """
    return json.dumps(dict(sorted(row.items())), ensure_ascii=False, separators=(",", ":"))


def with_joined_parts(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with the parts of each content joined, so that its hash does not depend on how a template prints parts."""
    return {
        key: [joined(message) if isinstance(message, dict) else message for message in value]
        if isinstance(value, list) and key in CONVERSATIONS
        else value
        for key, value in row.items()
    }


def canonical_json(row: Mapping[str, Any]) -> bytes:
    """Return the row as JSON bytes that depend only on its content. Raises RowError for text that UTF-8 cannot encode."""
    try:
        return json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        character = str(error.object)[error.start]
        raise RowError(
            f"text holds half of a surrogate pair (\\u{ord(character):04x}), which is no character"
        ) from None
    except (TypeError, ValueError) as error:
        raise RowError(f"a value is not JSON: {error}") from None


def hash_of(row: Mapping[str, Any], seed: int) -> int:
    """Return the hash of a row's content (64 bits), which decides whether the row is held out. Raises RowError."""
    return content_hash(canonical_json(for_hash(with_joined_parts(row))), seed)


def labels_of(row: Mapping[str, Any]) -> list[str]:
    """Return the labels of a normalised row: one, with `multi_label` any number, for tagged words the different tags."""
    if "tags" in row:
        return sorted(set(row["tags"]))
    return list(row["labels"]) if "labels" in row else [row["label"]] if "label" in row else []


def sort_labels(labels: Collection[str]) -> tuple[str, ...]:
    """Return the label names in the order of their indices: by value if all are integers (2 before 10, 01 before 1), otherwise by
    name."""
    try:
        return tuple(sorted(set(labels), key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(set(labels)))
