"""What a row must hold: formats found by column names, and each row brought to one shape or refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from dstune.config.data_schema import DataFormat
from dstune.config.schema import CausalLmConfig, ChatConfig, ClassificationConfig, TaskConfig
from dstune.errors import Problem, UserError

ROLES = ("system", "user", "assistant", "tool")

FORMAT_COLUMNS: dict[DataFormat, tuple[str, ...]] = {
    DataFormat.messages: ("messages",),
    DataFormat.prompt_completion: ("prompt", "completion"),
    DataFormat.text: ("text",),
    DataFormat.text_label: ("text", "label"),
}
"""The roles that a row of each format needs; `data.columns` maps a role to the column of the file."""

OPTIONAL_COLUMNS: dict[DataFormat, tuple[str, ...]] = {DataFormat.messages: ("tools",)}

FOLLOWERS = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
"""Which role may follow which."""


class RowError(ValueError):
    """This row cannot be used; the text says why."""


def formats_of(task: TaskConfig) -> tuple[DataFormat, ...]:
    """The formats that `task` can train on."""
    match task:
        case ChatConfig():
            return (DataFormat.messages, DataFormat.prompt_completion)
        case CausalLmConfig():
            return (DataFormat.text,)
        case ClassificationConfig():
            return (DataFormat.text_label,)
    raise AssertionError(f"no formats for {task!r}")


def check_columns(mapping: Mapping[str, str]) -> None:
    """Raises UserError if `data.columns` names a role that no format has."""
    known = sorted({role for roles in FORMAT_COLUMNS.values() for role in roles} | {"tools"})
    problems = [
        Problem(where=f"data.columns.{role}", value=column, reason="no such role", fix=f"roles: {', '.join(known)}")
        for role, column in mapping.items()
        if role not in known
    ]
    if problems:
        raise UserError(problems)


def recognise(
    columns: Collection[str], mapping: Mapping[str, str], named: DataFormat, task: TaskConfig, where: str
) -> DataFormat:
    """The format of a file with these `columns` under this task.

    `named` is `data.format`; `where` (`FILE:LINE`) is the row that the columns were read from.
    Raises UserError that lists the columns found and what was expected.
    """
    allowed = formats_of(task)
    if named is not DataFormat.auto:
        # Labels beside a text are no obstacle to train on the text.
        chosen = DataFormat.text if (named, allowed) == (DataFormat.text_label, (DataFormat.text,)) else named
        if chosen not in allowed:
            names = ", ".join(choice.name for choice in allowed)
            raise UserError(
                Problem(
                    where="data.format",
                    value=named.name,
                    reason=f"task={task.name} does not read this format",
                    fix=f"formats of this task: {names}",
                )
            )
        return chosen
    for choice in allowed:
        if all(mapping.get(role, role) in columns for role in FORMAT_COLUMNS[choice]):
            return choice
    expected = " or ".join(
        " + ".join(repr(mapping.get(role, role)) for role in FORMAT_COLUMNS[choice]) for choice in allowed
    )
    role = FORMAT_COLUMNS[allowed[0]][-1]
    raise UserError(
        Problem(
            where=where,
            reason=f"missing column: task={task.name} needs {expected}, the columns here are {_listing(columns)}",
            fix=_other_task(columns) or f"name the file's own columns, for example data.columns={{{role}: NAME}}",
        )
    )


def _other_task(columns: Collection[str]) -> str:
    if "messages" in columns or {"prompt", "completion"} <= set(columns):
        return "task=chat reads these columns"
    if {"text", "label"} <= set(columns):
        return "task=classification reads these columns"
    if "text" in columns:
        return "task=causal_lm reads these columns"
    return ""


def _listing(columns: Collection[str]) -> str:
    shown = [repr(column) for column in list(columns)[:12]]
    return ", ".join(shown) + (", ..." if len(columns) > 12 else "")


def normalise(
    fields: Mapping[str, Any], fmt: DataFormat, mapping: Mapping[str, str], *, needs_answer: bool = True
) -> dict[str, Any]:
    """The row in the one shape that the rest of the code reads; columns that the format does not know are dropped.

    Keys: `messages` (and `tools` where the row has any), `prompt` and `completion`, `text`, `text` and `label` (as a
    string). `needs_answer=False` accepts a conversation in which the assistant says nothing.
    Raises RowError.
    """
    row: dict[str, Any] = {}
    for role in FORMAT_COLUMNS[fmt]:
        column = mapping.get(role, role)
        if column not in fields:
            raise RowError(f"missing column {column!r}, the columns here are {_listing(fields)}")
        row[role] = _CHECKS[role](fields[column], column)
    for role in OPTIONAL_COLUMNS.get(fmt, ()):
        value = fields.get(mapping.get(role, role))
        if value:
            row[role] = _tools(value)
    if fmt is DataFormat.messages:
        _check_order(row["messages"], needs_answer)
    return row


def canonical(row: Mapping[str, Any]) -> bytes:
    """The row as JSON bytes that depend on its content only. Raises RowError for text that UTF-8 cannot hold."""
    try:
        return json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        character = str(error.object)[error.start]
        raise RowError(
            f"text holds half of a surrogate pair (\\u{ord(character):04x}), which is no character"
        ) from None
    except (TypeError, ValueError) as error:
        raise RowError(f"a value is not JSON: {error}") from None


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"column {column!r} must be text, it is {type(value).__name__}")
    if not value.strip():
        raise RowError(f"column {column!r} is empty")
    return value


def _label(value: Any, column: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of integers with gaps is read as floats
    if isinstance(value, str):
        value = value.strip()
    if not isinstance(value, (int, str)) or value == "":
        raise RowError(f"column {column!r} must be a label (text or an integer), it is {_shown(value)}")
    return str(value)


def _shown(value: Any) -> str:
    return "empty" if value is None or value == "" else f"{value!r:.60}"


def _tools(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowError(f"tools are not JSON: {error.msg}") from None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("tools must be a list of JSON schemas")
    return [_without_none(tool) for tool in value]


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    if isinstance(value, str):  # CSV and many Parquet files hold the conversation as JSON text
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowError(f"column {column!r} is text but not JSON: {error.msg}") from None
    if not isinstance(value, list) or not value:
        raise RowError(f"column {column!r} must be a list of messages that is not empty")
    return [_message(number, message) for number, message in enumerate(value, start=1)]


def _message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RowError(f"message {number} must be an object with role and content")
    message = _without_none(message)
    role = message.get("role")
    if role not in ROLES:
        raise RowError(f"message {number} has the unknown role {role!r}; roles are {', '.join(ROLES)}")
    if "content" not in message and message.get("tool_calls") and role == "assistant":
        return message
    if not isinstance(message.get("content"), str):
        raise RowError(f"message {number} ({role}): content must be text, it is {_shown(message.get('content'))}")
    return message


def _without_none(value: Any) -> Any:
    """`value` without the keys whose value is None: Parquet gives every object the keys of all of them."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def _check_order(messages: list[dict[str, Any]], needs_answer: bool) -> None:
    previous = "start"
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in FOLLOWERS[previous]:
            after = "at the start" if previous == "start" else f"after {previous}"
            raise RowError(
                f"message {number} has the role {role} {after}, where {' or '.join(FOLLOWERS[previous])} is expected"
            )
        previous = role
    if needs_answer and not any(message["role"] == "assistant" for message in messages):
        raise RowError("no trainable token: the conversation has no assistant message")


_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "messages": _messages,
    "prompt": _text,
    "completion": _text,
    "text": _text,
    "label": _label,
}


def sort_labels(labels: Collection[str]) -> tuple[str, ...]:
    """Label names in the order of their indices: by value where all are integers (2 before 10), else by name."""
    try:
        return tuple(sorted(set(labels), key=int))
    except ValueError:
        return tuple(sorted(set(labels)))
