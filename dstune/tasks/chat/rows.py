"""Row formats of conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dstune.data.content_names import content_names
from dstune.data.gemini import messages_of_contents, system_text, tools_of_declarations
from dstune.data.media import holds_something
from dstune.data.messages import (
    alpaca,
    conversation_of,
    conversation_row,
    is_list_of_messages,
    plain_exchange,
    with_system,
)
from dstune.data.preferences import is_verdict
from dstune.data.values import text, text_or_messages
from dstune.data.xlam import call_messages, schemas
from dstune.protocols import RowFormat, row_format
from dstune.protocols.row_format import Check
from dstune.protocols.task import Task

BESIDE = ("system", "tools", "parallel_tool_calls", "chat_template_kwargs", "images")
"""Optional roles of all conversation formats."""

QUESTIONS = ("question", "problem", "input", "user", "human")
ANSWERS = ("answer", "solution", "output", "assistant", "target")
"""Common column names of a prompt and its completion. They are only suggested in a message, since they may mean other things."""

JUDGED = (
    "task=preference task.loss=kto learns from good and bad answers, this task would learn the bad ones as well; a column that "
    "is no verdict needs another name"
)
COMPARED = "task=preference or task=reward compares chosen with rejected; data.format={} leaves both out"


class ConversationFormat(RowFormat):
    conversational = True
    other_names: ClassVar = {"tools": ("functions",), "images": ("image",)}

    def messages(self, values: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the conversation in the values of a row."""
        messages: list[dict[str, Any]] = values[self.required[0]]
        return messages

    def row(self, values: dict[str, Any], task: Task | None) -> dict[str, Any]:
        messages = with_system(self.messages(values), values.get("system"))
        return conversation_row(messages, values, needs_answer=task is None or task.needs_answer)

    def of_another_task(self, fields: Mapping[str, Any], mapping: Mapping[str, str], *, named: bool) -> str:
        for column in (mapping.get("label", "label"), "kto_tag"):
            if column in fields and is_verdict(fields[column]):
                return JUDGED
        worse = any(holds_something(fields.get(column)) for column in ("rejected_response", "rejected_messages"))
        pair = worse or {"chosen", "rejected"} <= fields.keys()
        return COMPARED.format(self.name) if pair and not named else ""


@row_format
class Messages(ConversationFormat):
    name = "messages"
    required = ("messages",)
    optional = BESIDE
    checks: ClassVar[dict[str, Check]] = {"messages": conversation_of}

    def expand(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Add the field `messages`: if no column has a usual name, it is the only column that is a list of messages."""
        if not fields.keys().isdisjoint(content_names()):
            return fields
        lists = [value for value in fields.values() if is_list_of_messages(value)]
        return {**fields, "messages": lists[0]} if len(lists) == 1 else fields


@row_format
class Conversations(ConversationFormat):
    name = "conversations"
    required = ("conversations",)
    optional = BESIDE
    other_names: ClassVar = {**ConversationFormat.other_names, "conversations": ("conversation",)}
    checks: ClassVar[dict[str, Check]] = {"conversations": conversation_of}


@row_format
class PromptCompletion(ConversationFormat):
    name = "prompt_completion"
    required = ("prompt", "completion")
    optional = ("history", *BESIDE)
    other_names: ClassVar = {**ConversationFormat.other_names, "prompt": ("query",), "completion": ("response",)}
    checks: ClassVar[dict[str, Check]] = {"prompt": text_or_messages, "completion": text_or_messages}

    def candidates(self, columns: Sequence[str], mapping: Mapping[str, str]) -> list[str]:
        return _question_and_answer(columns, mapping)

    def row(self, values: dict[str, Any], task: Task | None) -> dict[str, Any]:
        return plain_exchange(values, needs_answer=task is None or task.needs_answer)


@row_format
class Alpaca(ConversationFormat):
    name = "alpaca"
    required = ("instruction", "output")
    optional = ("input", "history", *BESIDE)
    checks: ClassVar[dict[str, Check]] = {"output": text}

    def candidates(self, columns: Sequence[str], mapping: Mapping[str, str]) -> list[str]:
        return [] if {"instruction", "output"} & {*columns} else _question_and_answer(columns, mapping)

    def messages(self, values: dict[str, Any]) -> list[dict[str, Any]]:
        return _alpaca_messages(values, input_apart=self.input_apart)


@row_format
class Dolly(ConversationFormat):
    """The columns of databricks-dolly-15k: an Alpaca row with other names."""

    name = "dolly"
    required = ("instruction", "context", "response")
    optional = ("history", *BESIDE)
    checks: ClassVar[dict[str, Check]] = {"response": text}

    def messages(self, values: dict[str, Any]) -> list[dict[str, Any]]:
        renamed = {**values, "input": values["context"], "output": values["response"]}
        return _alpaca_messages(renamed, input_apart=self.input_apart)


@row_format
class Gemini(ConversationFormat):
    """The columns of tuning files for Gemini: `contents` with `parts`."""

    name = "gemini"
    required = ("contents",)
    optional = BESIDE
    other_names: ClassVar = {
        **ConversationFormat.other_names,
        "system": ("systemInstruction", "system_instruction"),
    }
    checks: ClassVar[dict[str, Check]] = {"contents": messages_of_contents, "system": system_text}

    def row(self, values: dict[str, Any], task: Task | None) -> dict[str, Any]:
        tools = tools_of_declarations(values["tools"]) if values.get("tools") else None
        messages = conversation_of(values["contents"], "contents")
        return super().row({**values, "contents": messages, "tools": tools}, task)


@row_format
class Xlam(ConversationFormat):
    """The columns of xlam-function-calling-60k: the calls that answer a question."""

    name = "xlam"
    required = ("query", "tools", "answers")
    optional = ("system", "parallel_tool_calls", "chat_template_kwargs")
    other_names: ClassVar = {}
    checks: ClassVar[dict[str, Check]] = {"query": text}

    def row(self, values: dict[str, Any], task: Task | None) -> dict[str, Any]:
        messages = conversation_of(call_messages(values["query"], values["answers"]), "answers")
        tools = schemas(values["tools"]) if values["tools"] else None
        row = {**values, "tools": tools}
        return conversation_row(
            with_system(messages, values.get("system")), row, needs_answer=task is None or task.needs_answer
        )


def _question_and_answer(columns: Sequence[str], mapping: Mapping[str, str]) -> list[str]:
    """Return the columns that look like a question and its answer, if the mapping names no columns."""
    columns_found = [next((name for name in names if name in columns), "") for names in (QUESTIONS, ANSWERS)]
    return columns_found if all(columns_found) and not mapping else []


def _alpaca_messages(values: dict[str, Any], *, input_apart: bool) -> list[dict[str, Any]]:
    """Return the messages of an Alpaca row. If the instruction is empty, the input takes its place. Raises RowError."""
    instruction = values["instruction"]
    if isinstance(instruction, str | None) and not (instruction or "").strip():
        instruction, values = values.get("input") or "", {**values, "input": None}
    return alpaca({**values, "instruction": text(instruction, "instruction")}, input_apart=input_apart)
