"""What a row must hold: each row brought to one shape or refused with a reason."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from dstune.config.data_schema import DataFormat
from dstune.config.task_schema import (
    ChatConfig,
    ClassificationConfig,
    QuestionAnsweringConfig,
    TokenClassificationConfig,
)
from dstune.data.answers import answers_of, checked_answers
from dstune.data.formats import (
    FORMAT_COLUMNS,
    OPTIONAL_COLUMNS,
    check_columns,
    column_of,
    listing,
    recognise,
    with_languages,
)
from dstune.data.messages import (
    alpaca,
    check_answers,
    check_conversation,
    conversation_of,
    prompt_and_completion,
    text_or_nothing,
    tools_of,
    with_system,
)
from dstune.data.preferences import pair_row, verdict_of
from dstune.data.problems import RowError, shown
from dstune.data.tags import checked
from dstune.protocols.task import TaskConfig

__all__ = ["RowError", "canonical", "check_columns", "labels_of", "normalise", "recognise", "sort_labels"]


def normalise(
    fields: Mapping[str, Any], fmt: DataFormat, mapping: Mapping[str, str], task: TaskConfig | None = None
) -> dict[str, Any]:
    """The row in the one shape that the rest of the code reads; columns that the format does not know are dropped.

    Keys: `messages` (and `tools` where the row has any), `prompt` and `completion`, `source` and `target`, `text`, or `text` with
    `text_pair` where it has one and `label` (a string, in a regression a number) or `labels` (of a multi-label task: sorted
    strings, perhaps none), or `tokens` and `tags` (as many strings), or `question`, `context` and `answers` (each with `text` and
    `start`). Pairs of answers are those of `preferences.pair_row`; a judged answer is a chat row with `desirable` (true
    or false). task: what its settings allow, for example an assistant that says nothing.
    Raises RowError.
    """
    multi_label = isinstance(task, ClassificationConfig) and task.multi_label
    found: dict[str, Any] = {}
    if fmt is DataFormat.source_target:
        fields = with_languages(fields)
    for role in FORMAT_COLUMNS[fmt]:
        column = column_of(role, mapping, fields)
        if column not in fields:
            raise RowError(f"missing column {column!r}, the columns here are {listing(fields)}")
        check = _check_of(role, fmt, multi_label)
        if check is _label and isinstance(task, ClassificationConfig) and task.regression:
            check = _number
        found[role] = check(fields[column], column) if check else fields[column]
    for role in OPTIONAL_COLUMNS.get(fmt, ()):
        value = fields.get(column_of(role, mapping, fields))
        if value is not None:
            found[role] = value
    if fmt is DataFormat.contrastive:
        if "negative" in found:
            found["negative"] = _text(found["negative"], column_of("negative", mapping, fields))
        if found["positive"] == found.get("negative"):
            raise RowError("positive and negative are the same")
        return found
    if fmt in (DataFormat.text, DataFormat.text_label, DataFormat.pair):
        if multi_label and "label" in found:
            found["labels"] = found.pop("label")
        return found
    needs_answer = not (isinstance(task, ChatConfig) and task.train_on_prompt)
    if fmt is DataFormat.preference:
        return pair_row(found)
    if fmt is DataFormat.feedback:
        verdict = found.pop("label")
        return {**_chat(found, DataFormat.prompt_completion, needs_answer, silence=not verdict), "desirable": verdict}
    if fmt is DataFormat.tokens_tags:
        return _tagged(found, task if isinstance(task, TokenClassificationConfig) else TokenClassificationConfig())
    if fmt is DataFormat.squad:
        return _question(found, no_answer=isinstance(task, QuestionAnsweringConfig) and task.no_answer)
    if fmt is DataFormat.source_target:
        return found
    return _chat(found, fmt, needs_answer)


def _question(found: dict[str, Any], *, no_answer: bool) -> dict[str, Any]:
    named = f"question {found['id']!r}: " if isinstance(found.get("id"), str) else ""
    try:
        answers = [] if found.get("is_impossible") is True else answers_of(found["answers"])
        checked_answers(answers, found["context"], no_answer=no_answer)
    except RowError as error:  # many files have all questions in one line
        raise RowError(f"{named}{error}") from None
    return {"question": found["question"], "context": found["context"], "answers": answers}


def _tagged(found: dict[str, Any], task: TokenClassificationConfig) -> dict[str, Any]:
    tokens, tags = found["tokens"], found["tags"]
    if len(tokens) != len(tags):
        raise RowError(f"{len(tokens)} tokens have {len(tags)} tags")
    return {
        "tokens": tokens,
        "tags": checked([_tag(tag, task.labels) for tag in tags], tokens, task.scheme, repair=task.repair),
    }


def _tag(value: Any, names: list[str]) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if not names:
            raise RowError(f"tag {value} is a number; task.labels=[NAME,NAME] names the tags in their order")
        if not 0 <= value < len(names):
            raise RowError(f"tag {value} is not the number of one of the {len(names)} task.labels")
        return names[value]
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"a tag must be text or a number, it is {shown(value)}")
    return value.strip()


def _check_of(role: str, fmt: DataFormat, multi_label: bool) -> Callable[[Any, str], Any] | None:
    if role == "label":
        return verdict_of if fmt is DataFormat.feedback else _labels if multi_label else _label
    return _CHECKS.get(role)


def _chat(found: dict[str, Any], fmt: DataFormat, needs_answer: bool, *, silence: bool = False) -> dict[str, Any]:
    """silence: an answer that says nothing may be learned from."""
    tools = tools_of(found["tools"]) if found.get("tools") else []
    match fmt:
        case DataFormat.messages:
            messages = found["messages"]
        case DataFormat.conversations:
            messages = with_system(found["conversations"], found.get("system"))
        case DataFormat.alpaca:
            messages = with_system(alpaca(found), found.get("system"))
        case _:
            prompt, completion = found["prompt"], found["completion"]
            plain = isinstance(prompt, str) and isinstance(completion, str)
            if plain and not tools and not text_or_nothing(found.get("system"), "system"):
                return {"prompt": prompt, "completion": completion}
            messages = with_system(prompt_and_completion(prompt, completion), found.get("system"))
    parallel = found.get("parallel_tool_calls")
    if parallel is not None and not isinstance(parallel, bool):
        raise RowError(f"parallel_tool_calls must be true or false, it is {shown(parallel)}")
    check_conversation(messages, needs_answer=needs_answer, parallel_tool_calls=parallel)
    if needs_answer and not silence:
        check_answers(messages)
    return {"messages": messages, **({"tools": tools} if tools else {})}


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


def _text_or_messages(value: Any, column: str) -> Any:
    if isinstance(value, list):
        return value
    if not isinstance(value, str):
        raise RowError(f"column {column!r} must be text or a list of messages, it is {type(value).__name__}")
    return _text(value, column)


def _label(value: Any, column: str) -> str:
    if isinstance(value, list):
        if len(value) == 1:
            return _label(value[0], column)
        several = f"column {column!r} has {len(value)} labels ({shown(value)})"
        raise RowError(f"{several}; task.multi_label=true trains on any number of them")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of integers with gaps is read as floats
    if isinstance(value, str):
        value = value.strip()
    if not isinstance(value, (int, str)) or value == "":
        raise RowError(f"column {column!r} must be a label (text or an integer), it is {shown(value)}")
    return str(value)


def _number(value: Any, column: str) -> float:
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"column {column!r} must be a number, it is {shown(value)}")
    return number


def _labels(value: Any, column: str) -> list[str]:
    """Any number of labels: a list, in a CSV file a JSON list or names with commas between them."""
    if isinstance(value, str):
        if value.strip().startswith("["):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise RowError(f"column {column!r} starts as a list but is not JSON: {error.msg}") from None
        else:
            value = [name for name in value.split(",") if name.strip()]
    elif isinstance(value, (int, float)):
        value = [value]
    if not isinstance(value, list):
        raise RowError(f"column {column!r} must be a list of labels, it is {shown(value)}")
    return sorted({_label(item, column) for item in value})


def _list(value: Any, column: str) -> list[Any]:
    """A list with something in it; in a CSV file a JSON list, or words with spaces between them."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, list):
        raise RowError(f"column {column!r} must be a list, it is {shown(value)}")
    if not value:
        raise RowError(f"column {column!r} is empty")
    return value


def _tokens(value: Any, column: str) -> list[str]:
    words = _list(value, column)
    for number, word in enumerate(words, start=1):
        if not isinstance(word, str) or not word.strip():
            raise RowError(f"word {number} of column {column!r} must be text, it is {shown(word)}")
    return words


_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "messages": conversation_of,
    "conversations": conversation_of,
    "instruction": _text,
    "output": _text,
    "prompt": _text_or_messages,
    "completion": _text_or_messages,
    "text": _text,
    "text_pair": _text,
    "anchor": _text,
    "positive": _text,
    "tokens": _tokens,
    "tags": _list,
    "question": _text,
    "context": _text,
    "source": _text,
    "target": _text,
}


def has_labels(task: TaskConfig) -> bool:
    """Whether the rows of `task` have labels whose names are to be found."""
    return isinstance(task, TokenClassificationConfig) or (
        isinstance(task, ClassificationConfig) and not task.regression
    )


def has_several(task: TaskConfig) -> bool:
    """Whether a row has any number of labels."""
    return isinstance(task, TokenClassificationConfig) or (isinstance(task, ClassificationConfig) and task.multi_label)


def labels_of(row: Mapping[str, Any]) -> list[str]:
    """The labels of a normalised row: one, with `multi_label` any number, of words those that occur."""
    if "tags" in row:
        return sorted(set(row["tags"]))
    return list(row["labels"]) if "labels" in row else [row["label"]] if "label" in row else []


def sort_labels(labels: Collection[str]) -> tuple[str, ...]:
    """Label names in the order of their indices: by value where all are integers (2 before 10), else by name."""
    try:
        return tuple(sorted(set(labels), key=int))
    except ValueError:
        return tuple(sorted(set(labels)))
