"""Row formats: how one is recognised by the columns of a file, and how a file's own columns are named."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import cache

from dstune.config.data_schema import AUTOMATIC
from dstune.core.errors import Problem, UserError
from dstune.core.registry import on_change
from dstune.data.problems import listing
from dstune.protocols import ROW_FORMATS, TASKS, formats_for, task_of
from dstune.protocols.task import TaskConfig


@cache
def other_names() -> Mapping[str, Sequence[str]]:
    """By role, the columns that are taken for it in any format where nothing else gives one."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for form in ROW_FORMATS.classes().values():
        for role, names in form.other_names.items():
            found[role] |= dict.fromkeys(names)
    return {role: tuple(names) for role, names in found.items()}


on_change(other_names.cache_clear)


def column_of(role: str, mapping: Mapping[str, str], columns: Collection[str]) -> str:
    """The column of a file that holds `role`: as `data.columns` says, else of the role's own or another usual name."""
    if role in mapping:
        return mapping[role]
    if role not in columns:
        for other in other_names().get(role, ()):
            if other in columns:
                return other
    return role


def check_columns(mapping: Mapping[str, str], key: str = "data.columns") -> None:
    """Raises UserError if `data.columns` names a role that no format has."""
    problems = []
    roles = sorted({role for form in ROW_FORMATS.classes().values() for role in (*form.required, *form.optional)})
    for role, column in mapping.items():
        if role not in roles:
            close = difflib.get_close_matches(role, roles, n=1)
            fix = (
                _mapping(key, {close[0] if name == role else name: of for name, of in mapping.items()}) if close else ""
            )
            fix = fix or f"roles: {', '.join(roles)}"
            problems.append(Problem(where=f"{key}.{role}", value=column, reason="no such role", fix=fix))
    if problems:
        raise UserError(problems)


def recognise(columns: Collection[str], mapping: Mapping[str, str], named: str, task: TaskConfig, where: str) -> str:
    """The format of a file with these `columns` under this task.

    `named` is `data.format`; `where` (`FILE:LINE`) is the row that the columns were read from.
    Raises UserError that lists the columns found and what was expected.
    """
    allowed = formats_for(task_of(task))
    for name in allowed:
        columns = ROW_FORMATS[name]().expand(columns) if isinstance(columns, Mapping) else columns
    if named != AUTOMATIC:
        # Labels beside a text are no obstacle to train on the text.
        readable = (named, *ROW_FORMATS[named].readable_as)
        chosen = next((name for name in readable if name in allowed), None)
        if chosen is None:
            raise UserError(
                Problem(
                    where="data.format",
                    value=named,
                    reason=f"task={task.name} does not read this format",
                    fix=f"formats of this task: {', '.join(allowed)}",
                )
            )
        form = ROW_FORMATS[chosen]
        needed = (*form.required, *form.optional)
        _check_mapped(columns, {role: of for role, of in mapping.items() if role in needed}, mapping, where)
        return chosen
    for name in allowed:
        if not _missing(name, mapping, columns):
            return name
    _check_mapped(columns, mapping, mapping, where)
    nearest = sorted(allowed, key=lambda name: len(_missing(name, mapping, columns)))
    expected = " or ".join(
        " + ".join(repr(mapping.get(role, role)) for role in ROW_FORMATS[name].required) for name in nearest
    )
    missing = dict.fromkeys(_missing(nearest[0], mapping, columns), "NAME")
    missing |= dict(zip(missing, ROW_FORMATS[nearest[0]]().candidates(list(columns), mapping), strict=False))
    raise UserError(
        Problem(
            where=where,
            reason=f"missing column: task={task.name} needs {expected}, the columns here are {listing(columns)}",
            fix=_other_task(columns)
            or f"name the file's own columns, for example {_mapping('data.columns', {**mapping, **missing})}",
        )
    )


def _missing(name: str, mapping: Mapping[str, str], columns: Collection[str]) -> list[str]:
    return [role for role in ROW_FORMATS[name].required if column_of(role, mapping, columns) not in columns]


def _check_mapped(columns: Collection[str], used: Mapping[str, str], mapping: Mapping[str, str], where: str) -> None:
    """Raises UserError where `data.columns` names a column that the file does not have, with the nearest that it has."""
    problems = []
    absent = {role: column for role, column in used.items() if column not in columns}
    mended = dict(mapping)
    for role, column in absent.items():
        close = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
        mended[role] = close[0] if close else next(iter(columns), "NAME")
    for role, column in absent.items():
        reason = f"{where} has no such column, the columns there are {listing(columns)}"
        fix = _mapping("data.columns", mended)
        problems.append(Problem(where=f"data.columns.{role}", value=column, reason=reason, fix=fix))
    if problems:
        raise UserError(problems)


def _mapping(key: str, mapping: Mapping[str, str]) -> str:
    """The mapping as it is typed in a shell."""
    return f"'{key}={{{', '.join(f'{role}: {_quoted(column)}' for role, column in mapping.items())}}}'"


def _quoted(column: str) -> str:
    return column if column.replace("_", "").isalnum() else f'"{column}"'


def _other_task(columns: Collection[str]) -> str:
    """The tasks that read the format which needs the most of these columns."""
    formats: dict[str, list[str]] = defaultdict(list)
    for name, cls in TASKS.classes().items():
        for fmt in cls(cls.Config()).read_formats:
            formats[fmt].append(f"task={name}")
    fitting = [name for name in formats if not _missing(name, {}, columns)]
    if not fitting:
        return ""
    tasks = formats[max(fitting, key=lambda name: len(ROW_FORMATS[name].required))]
    return f"{' and '.join(tasks)} read{'s' * (len(tasks) == 1)} these columns"
