"""Row formats: the columns that each needs, how one is recognised, and how a file's own columns are named."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from dstune.config.data_schema import DataFormat
from dstune.config.task_schema import (
    CausalLmConfig,
    ChatConfig,
    ClassificationConfig,
    EmbeddingConfig,
    PreferenceConfig,
    PreferenceLoss,
    QuestionAnsweringConfig,
    RewardConfig,
    Seq2SeqConfig,
    TokenClassificationConfig,
)
from dstune.errors import Problem, UserError
from dstune.protocols.task import TaskConfig

FORMAT_COLUMNS: dict[DataFormat, tuple[str, ...]] = {
    DataFormat.messages: ("messages",),
    DataFormat.conversations: ("conversations",),
    DataFormat.alpaca: ("instruction", "output"),
    DataFormat.prompt_completion: ("prompt", "completion"),
    DataFormat.text: ("text",),
    DataFormat.pair: ("text", "text_pair", "label"),
    DataFormat.text_label: ("text", "label"),
    DataFormat.preference: ("chosen", "rejected"),
    DataFormat.feedback: ("prompt", "completion", "label"),
    DataFormat.contrastive: ("anchor", "positive"),
    DataFormat.tokens_tags: ("tokens", "tags"),
    DataFormat.squad: ("question", "context", "answers"),
    DataFormat.source_target: ("source", "target"),
}
"""The roles that a row of each format needs; `data.columns` maps a role to the column of the file."""

OPTIONAL_COLUMNS: dict[DataFormat, tuple[str, ...]] = {
    DataFormat.messages: ("tools", "parallel_tool_calls"),
    DataFormat.conversations: ("system", "tools"),
    DataFormat.alpaca: ("input", "system", "history"),
    DataFormat.prompt_completion: ("system", "tools"),
    DataFormat.preference: ("prompt", "system", "tools", "margin"),
    DataFormat.feedback: ("system", "tools"),
    DataFormat.contrastive: ("negative",),
    DataFormat.squad: ("id", "is_impossible"),
}

OTHER_NAMES = {
    "completion": ("response",),
    "conversations": ("conversation",),
    "label": ("labels",),
    "source": ("document", "article", "dialogue"),
    "target": ("summary", "highlights", "abstract"),
    "tools": ("functions",),
    "tokens": ("words",),
    "tags": ("ner_tags", "labels"),
}
"""Columns that are taken for a role where neither the role's own name nor `data.columns` gives one."""

ROLES = sorted({role for table in (FORMAT_COLUMNS, OPTIONAL_COLUMNS) for roles in table.values() for role in roles})


def formats_of(task: TaskConfig) -> tuple[DataFormat, ...]:
    """The formats that `task` can train on, the first that fits first."""
    match task:
        case ChatConfig():
            return (
                DataFormat.messages,
                DataFormat.conversations,
                DataFormat.prompt_completion,
                DataFormat.alpaca,
            )
        case CausalLmConfig():
            return (DataFormat.text,)
        case ClassificationConfig():
            return (DataFormat.pair, DataFormat.text_label)
        case PreferenceConfig():
            judged = (DataFormat.feedback,) if task.loss is PreferenceLoss.kto else ()
            return (*judged, DataFormat.preference)
        case RewardConfig():
            return (DataFormat.preference,)
        case EmbeddingConfig():
            return (DataFormat.contrastive,)
        case TokenClassificationConfig():
            return (DataFormat.tokens_tags,)
        case QuestionAnsweringConfig():
            return (DataFormat.squad,)
        case Seq2SeqConfig():
            return (DataFormat.source_target,)
    raise AssertionError(f"no formats for {task!r}")


def with_languages(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row whose column `translation` holds a text for each language (`{"en": ..., "es": ...}`), with these beside it."""
    texts = fields.get("translation")
    return {**texts, **fields} if isinstance(texts, Mapping) else fields


def column_of(role: str, mapping: Mapping[str, str], columns: Collection[str]) -> str:
    """The column of a file that holds `role`: as `data.columns` says, else of the role's own or another usual name."""
    if role in mapping:
        return mapping[role]
    if role not in columns:
        for other in OTHER_NAMES.get(role, ()):
            if other in columns:
                return other
    return role


def check_columns(mapping: Mapping[str, str], key: str = "data.columns") -> None:
    """Raises UserError if `data.columns` names a role that no format has."""
    problems = []
    for role, column in mapping.items():
        if role not in ROLES:
            close = difflib.get_close_matches(role, ROLES, n=1)
            fix = (
                _mapping(key, {close[0] if name == role else name: of for name, of in mapping.items()}) if close else ""
            )
            fix = fix or f"roles: {', '.join(ROLES)}"
            problems.append(Problem(where=f"{key}.{role}", value=column, reason="no such role", fix=fix))
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
    if isinstance(task, Seq2SeqConfig) and isinstance(columns, Mapping):
        columns = with_languages(columns)
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
        needed = FORMAT_COLUMNS[chosen] + OPTIONAL_COLUMNS.get(chosen, ())
        _check_mapped(columns, {role: of for role, of in mapping.items() if role in needed}, mapping, where)
        return chosen
    for choice in allowed:
        if all(column_of(role, mapping, columns) in columns for role in FORMAT_COLUMNS[choice]):
            return choice
    _check_mapped(columns, mapping, mapping, where)
    nearest = sorted(allowed, key=lambda choice: len(_missing(choice, mapping, columns)))
    expected = " or ".join(
        " + ".join(repr(mapping.get(role, role)) for role in FORMAT_COLUMNS[choice]) for choice in nearest
    )
    wanted = dict.fromkeys(_missing(nearest[0], mapping, columns), "NAME")
    if isinstance(task, Seq2SeqConfig):
        free = [column for column in columns if column not in ("translation", "id", *mapping.values())]
        wanted |= dict(zip(wanted, free, strict=False))
    raise UserError(
        Problem(
            where=where,
            reason=f"missing column: task={task.name} needs {expected}, the columns here are {listing(columns)}",
            fix=_other_task(columns)
            or f"name the file's own columns, for example {_mapping('data.columns', {**mapping, **wanted})}",
        )
    )


def _missing(choice: DataFormat, mapping: Mapping[str, str], columns: Collection[str]) -> list[str]:
    return [role for role in FORMAT_COLUMNS[choice] if column_of(role, mapping, columns) not in columns]


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
    def has(choice: DataFormat) -> bool:
        return not _missing(choice, {}, columns)

    if has(DataFormat.preference):
        return "task=preference and task=reward read these columns"
    if has(DataFormat.contrastive):
        return "task=embedding reads these columns"
    if any(has(choice) for choice in formats_of(ChatConfig())):
        return "task=chat reads these columns"
    if any(has(choice) for choice in formats_of(ClassificationConfig())):
        return "task=classification reads these columns"
    if has(DataFormat.squad):
        return "task=question_answering reads these columns"
    if has(DataFormat.tokens_tags):
        return "task=token_classification reads these columns"
    if has(DataFormat.source_target):
        return "task=seq2seq reads these columns"
    if has(DataFormat.text):
        return "task=causal_lm reads these columns"
    return ""


def listing(columns: Collection[str]) -> str:
    """Column names for a message, the first twelve of them."""
    found = [repr(column) for column in list(columns)[:12]]
    return ", ".join(found) + (", ..." if len(columns) > 12 else "")
