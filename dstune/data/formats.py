"""Recognise the row format of a file by its columns, and map the file's columns to the format's roles."""

from __future__ import annotations

import difflib
import shlex
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dstune.config.data_schema import AUTOMATIC
from dstune.core.errors import Problem, UserError
from dstune.data.content_names import content_names
from dstune.data.media import holds_something
from dstune.data.problems import listing
from dstune.protocols import ROW_FORMATS, TASKS, RowFormat, formats_for, task_of
from dstune.protocols.task import TaskConfig


def column_of(form: type[RowFormat], role: str, mapping: Mapping[str, str], columns: Collection[str]) -> str:
    """Return the column of a file that holds `role`: the one in `mapping` (`data.columns`), or else that of the role's name, or
    of another usual name."""
    if role in mapping:
        return mapping[role]
    if role not in columns:
        for other in form.other_names.get(role, ()):
            if other in columns:
                return other
    return role


def columns_read(form: type[RowFormat], mapping: Mapping[str, str], columns: Collection[str]) -> set[str]:
    """Return the columns of a file that the format reads."""
    return {column_of(form, role, mapping, columns) for role in (*form.required, *form.optional)} & set(columns)


def shape_of(fmt: str) -> str:
    """Return the format whose encoder also reads rows of the format `fmt`: often `fmt` itself."""
    return (ROW_FORMATS[fmt].shape if fmt in ROW_FORMATS else "") or fmt


def shape_of_all(formats: Collection[str], task: TaskConfig) -> str:
    """Return the format whose encoder reads the rows of all `formats` in one run: `messages` if it is among their shapes,
    otherwise the first one that the task reads."""
    shapes = {shape_of(fmt) for fmt in formats}
    return next((name for name in ("messages", *task_of(task).read_formats) if name in shapes), AUTOMATIC)


def check_columns(mapping: Mapping[str, str]) -> None:
    """Raise UserError if `data.columns` names a role that no format has."""
    problems = []
    roles = sorted({role for form in ROW_FORMATS.classes().values() for role in (*form.required, *form.optional)})
    for role, column in mapping.items():
        if role not in roles:
            close = difflib.get_close_matches(role, roles, n=1)
            fix = f"roles: {', '.join(roles)}"
            if close:
                fix = _mapping(
                    "data.columns",
                    {close[0] if name == role else name: mapped_column for name, mapped_column in mapping.items()},
                )
            problems.append(Problem(where=f"data.columns.{role}", value=column, reason="no such role", fix=fix))
    if problems:
        raise UserError(problems)


def recognise(
    columns: Collection[str], mapping: Mapping[str, str], format_name: str, task: TaskConfig, where: str
) -> str:
    """Return the format of a file with these `columns` under this task.

    `format_name` is `data.format`; `where` (`FILE:LINE`) is the row that the columns were read from.
    Raises UserError that lists the columns found and what was expected.
    """
    allowed = formats_for(task_of(task))
    for name in allowed:
        columns = ROW_FORMATS[name]().expand(columns) if isinstance(columns, Mapping) else columns
    if format_name != AUTOMATIC:
        # Rows with further columns, as labels next to a text, can be read as a simpler format.
        readable = (format_name, *ROW_FORMATS[format_name].readable_as)
        chosen = next((name for name in readable if name in allowed), None)
        if chosen is None:
            raise UserError(
                Problem(
                    where="data.format",
                    value=format_name,
                    reason=f"task={task.name} does not read this format",
                    fix=f"formats of this task: {', '.join(allowed)}",
                )
            )
        needed = ROW_FORMATS[chosen].required
        _check_mapped(columns, {role: column for role, column in mapping.items() if role in needed}, mapping, where)
        return chosen
    allowed = tuple(name for name in allowed if not ROW_FORMATS[name].only_named)
    if fitting := [name for name in allowed if not _missing(name, mapping, columns)]:
        # The user names columns in `data.columns` for a reason: take the first format that reads the most of them.
        return max(
            fitting, key=lambda name: len(mapping.keys() & {*ROW_FORMATS[name].required, *ROW_FORMATS[name].optional})
        )
    _check_mapped(columns, mapping, mapping, where)
    # Of formats that lack equally many columns, the one that has more of its required columns comes first.
    missing_counts = {name: len(_missing(name, mapping, columns)) for name in allowed}
    nearest = sorted(
        allowed, key=lambda name: (missing_counts[name], missing_counts[name] - len(ROW_FORMATS[name].required))
    )
    expected = " or ".join(
        " + ".join(repr(mapping.get(role, role)) for role in ROW_FORMATS[name].required) for name in nearest
    )
    reason = f"missing column: task={task.name} needs {expected}, the columns here are {listing(columns)}"
    # A task that reads any further columns was chosen for them: propose the name of a column, not another task.
    keeps_columns = any(ROW_FORMATS[name].keeps_columns for name in allowed)
    fix = (not keeps_columns and _other_task(columns)) or _suggestion(nearest, mapping, columns)
    raise UserError(Problem(where=where, reason=reason, fix=fix))


def _suggestion(nearest: Sequence[str], mapping: Mapping[str, str], columns: Collection[str]) -> str:
    """Return a fix that sets `data.columns` so that one of the `nearest` formats reads these columns: the one that leaves out the
    fewest columns with content."""
    suggested = {name: ROW_FORMATS[name]().candidates(list(columns), mapping) for name in nearest}
    good_names = [name for name in nearest if len(suggested[name]) >= len(_missing(name, mapping, columns))]
    suggestions = []
    for name in good_names or nearest[:1]:
        form = ROW_FORMATS[name]
        missing = dict.fromkeys(_missing(name, mapping, columns), "NAME")
        unread_columns = [column for column in columns if column not in columns_read(form, mapping, columns)]
        candidates = unread_columns if len(unread_columns) == len(missing) == 1 else suggested[name]
        suggestion = {**mapping, **missing, **dict(zip(missing, candidates, strict=False))}
        is_complete = "NAME" not in suggestion.values()
        unread = content_left_out(form, suggestion, columns) if is_complete else []
        if len(unread) == 1 and "input" in form.optional:
            suggestion, unread = {**suggestion, "input": unread[0]}, []
        suggestions.append((suggestion, unread))
    suggestion, unread = min(suggestions, key=lambda candidate: len(candidate[1]))
    return f"name the file's own columns, for example {_mapping('data.columns', suggestion)}{_left_out(unread)}"


def content_left_out(form: type[RowFormat], mapping: Mapping[str, str], columns: Collection[str]) -> list[str]:
    """Return the columns that look like content and are not read by this format, without empty ones."""
    read = columns_read(form, mapping, columns)
    names = content_names()
    return [
        column
        for column in columns
        if column in names
        and column not in read
        and (not isinstance(columns, Mapping) or holds_something(columns[column]))
    ]


def _left_out(columns: Sequence[str]) -> str:
    if not columns:
        return ""
    is_one = len(columns) == 1
    are, their = ("is", "its") if is_one else ("are", "their")
    return f"; {listing(columns)} {are} not read then: move {their} text into one of the columns that are"


def check_task(
    name: str, fields: Mapping[str, Any], mapping: Mapping[str, str], format_name: str, task: TaskConfig, where: str
) -> None:
    """Raise UserError if a row has the format `name` but belongs to another task."""
    fix = ROW_FORMATS[name]().of_another_task(fields, mapping, named=format_name != AUTOMATIC)
    if fix:
        reason = f"these rows are of another task than {task.name}: the columns here are {listing(fields)}"
        raise UserError(Problem(where=where, reason=reason, fix=fix))


def check_mapped(columns: Collection[str], mapping: Mapping[str, str], where: str, key: str = "data.columns") -> None:
    """Raise UserError if `data.columns` names a column that no row has, even if another format fits the rows.

    columns: those of all rows.
    """
    _check_mapped(columns, mapping, mapping, where, key)


def _missing(name: str, mapping: Mapping[str, str], columns: Collection[str]) -> list[str]:
    form = ROW_FORMATS[name]
    return [role for role in form.required if column_of(form, role, mapping, columns) not in columns]


def _check_mapped(
    columns: Collection[str], used: Mapping[str, str], mapping: Mapping[str, str], where: str, key: str = "data.columns"
) -> None:
    """Raise UserError if a column in `used` is not in the file, with the nearest one that is.

    used: the part of `mapping` (`data.columns`) to check. key: the name of `data.columns` in problems.
    """
    problems = []
    absent = {role: column for role, column in used.items() if column not in columns}
    corrected = dict(mapping)
    for role, column in absent.items():
        close = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
        corrected[role] = close[0] if close else next(iter(columns), "NAME")
    for role, column in absent.items():
        reason = f"{where} has no such column, the columns there are {listing(columns)}"
        fix = _mapping(key, corrected)
        problems.append(Problem(where=f"{key}.{role}", value=column, reason=reason, fix=fix))
    if problems:
        raise UserError(problems)


def _mapping(key: str, mapping: Mapping[str, str]) -> str:
    """Return the mapping as a user types it in a shell, without nested quotes."""
    if all(column.replace("_", "").isalnum() and column.isascii() for column in mapping.values()):
        return f"'{key}={{{', '.join(f'{role}: {column}' for role, column in mapping.items())}}}'"
    return " ".join(shlex.quote(f"{key}.{role}={column}") for role, column in mapping.items())


def _other_task(columns: Collection[str]) -> str:
    """Return a fix that names the tasks for these columns, with what else they need set; empty if no format fits.

    Of the formats that fit, the one that requires the most columns decides.
    """
    formats: dict[str, list[str]] = defaultdict(list)
    for name, cls in TASKS.classes().items():
        task = cls(cls.Config())
        for fmt in (name for name in task.formats if not ROW_FORMATS[name].keeps_columns):
            if fmt in task.read_formats or ROW_FORMATS[fmt].further_keys:
                formats[fmt].append(f"task={name} {ROW_FORMATS[fmt].further_keys}".rstrip())
    fitting = [name for name in formats if not _missing(name, {}, columns)]
    if not fitting:
        return ""
    name = max(fitting, key=lambda name: len(ROW_FORMATS[name].required))
    tasks = formats[name]
    left_out = _left_out(content_left_out(ROW_FORMATS[name], {}, columns))
    return f"{' and '.join(tasks)} read{'s' * (len(tasks) == 1)} these columns{left_out}"
