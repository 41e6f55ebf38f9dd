"""Row formats of conversations."""

from __future__ import annotations

from typing import Any, ClassVar

from dstune.data.messages import alpaca, conversation_of, conversation_row, plain_exchange, with_system
from dstune.data.values import text, text_or_messages
from dstune.protocols import RowFormat, row_format
from dstune.protocols.row_format import Check
from dstune.protocols.task import Task


class ConversationFormat(RowFormat):
    other_names: ClassVar = {"tools": ("functions",)}

    def messages(self, found: dict[str, Any]) -> list[dict[str, Any]]:
        """The conversation in the values of a row."""
        raise NotImplementedError

    def row(self, found: dict[str, Any], task: Task | None) -> dict[str, Any]:
        return conversation_row(self.messages(found), found, needs_answer=task is None or task.needs_answer)


@row_format
class Messages(ConversationFormat):
    name = "messages"
    required = ("messages",)
    optional = ("tools", "parallel_tool_calls", "chat_template_kwargs")
    checks: ClassVar[dict[str, Check]] = {"messages": conversation_of}

    def messages(self, found: dict[str, Any]) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = found["messages"]
        return messages


@row_format
class Conversations(ConversationFormat):
    name = "conversations"
    required = ("conversations",)
    optional = ("system", "tools", "chat_template_kwargs")
    other_names: ClassVar = {**ConversationFormat.other_names, "conversations": ("conversation",)}
    checks: ClassVar[dict[str, Check]] = {"conversations": conversation_of}

    def messages(self, found: dict[str, Any]) -> list[dict[str, Any]]:
        return with_system(found["conversations"], found.get("system"))


@row_format
class Alpaca(ConversationFormat):
    name = "alpaca"
    required = ("instruction", "output")
    optional = ("input", "system", "history")
    checks: ClassVar[dict[str, Check]] = {"instruction": text, "output": text}

    def messages(self, found: dict[str, Any]) -> list[dict[str, Any]]:
        return with_system(alpaca(found), found.get("system"))


@row_format
class PromptCompletion(RowFormat):
    name = "prompt_completion"
    required = ("prompt", "completion")
    optional = ("system", "tools", "chat_template_kwargs")
    other_names: ClassVar = {"completion": ("response",)}
    checks: ClassVar[dict[str, Check]] = {"prompt": text_or_messages, "completion": text_or_messages}

    def row(self, found: dict[str, Any], task: Task | None) -> dict[str, Any]:
        return plain_exchange(found, needs_answer=task is None or task.needs_answer)
