"""Row formats of compared and judged answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dstune.data.images.places import COLUMN
from dstune.data.media import holds_something
from dstune.data.message import from_json
from dstune.data.messages import after_history, conversation_of, plain_exchange, with_input
from dstune.data.preferences import pair_row, parted, verdict_of
from dstune.data.problems import RowError, format_value
from dstune.data.values import text_or_messages
from dstune.protocols import RowFormat, row_format
from dstune.protocols.row_format import Check
from dstune.protocols.task import Task

BESIDE = ("system", "tools", "chat_template_kwargs", COLUMN)
OTHER_NAMES = {"tools": ("functions",), COLUMN: ("image",)}
REQUEST = ("messages", "tools", "functions", "parallel_tool_calls")
"""Keys that the column `input` of an OpenAI pair may have."""


@row_format
class PreferenceFormat(RowFormat):
    name = "preference"
    conversational = True
    required = ("chosen", "rejected")
    optional = ("prompt", "input", "history", "margin", *BESIDE)
    other_names: ClassVar = {
        "prompt": ("instruction", "query", "question", "conversations", "conversation", "messages"),
        "chosen": ("chosen_messages",),
        "rejected": ("rejected_messages",),
        **OTHER_NAMES,
    }

    def expand(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a pair in the columns of ms-swift as columns of this format; other rows are unchanged. ms-swift has the better
        answer in `messages` or `response`, the worse one in `rejected_response`, or its conversation in `rejected_messages`."""
        worse, messages = fields.get("rejected_response"), fields.get("messages")
        if "rejected" in fields or "chosen" in fields:
            return fields
        if messages and fields.get("rejected_messages"):
            return _instead(fields, ("messages",), chosen=messages)
        if isinstance(worse, str) and isinstance(messages, list) and messages:
            instead = [*messages[:-1], {"role": "assistant", "content": worse}]
            return _instead(fields, ("messages", "rejected_response"), chosen=messages, rejected=instead)
        if isinstance(worse, str) and "response" in fields:
            return _instead(fields, ("response", "rejected_response"), chosen=fields["response"], rejected=worse)
        return fields

    def row(self, values: dict[str, Any], task: Task | None) -> dict[str, Any]:
        return pair_row(values)


@row_format
class OpenAIPreference(RowFormat):
    """Pairs in the form of OpenAI's fine-tuning API: the request, the better answer and the worse one."""

    name = "openai_preference"
    conversational = True
    required = ("input", "preferred_output", "non_preferred_output")

    def row(self, values: dict[str, Any], task: Task | None) -> dict[str, Any]:
        request = values["input"]
        if isinstance(request, str):
            request = from_json(request, "column 'input' is text but not JSON")
        if not isinstance(request, Mapping) or not isinstance(request.get("messages"), list):
            raise RowError(f"column 'input' must be an object with messages, it is {format_value(request)}")
        if strange := [key for key in request if key not in REQUEST and holds_something(request[key])]:
            raise RowError(f"column 'input' has the key {strange[0]!r}, which is not read")
        tools = request.get("tools") or request.get("functions")
        answers = {"chosen": values["preferred_output"], "rejected": values["non_preferred_output"]}
        return pair_row({"prompt": request["messages"], "tools": tools, **answers})


def _instead(fields: Mapping[str, Any], removed: Sequence[str], **columns: Any) -> dict[str, Any]:
    """Return `fields` without the `removed` columns and with `columns` added."""
    return {name: value for name, value in fields.items() if name not in removed} | columns


class Judged(RowFormat):
    """An answer with a verdict."""

    conversational = True
    further_keys = "task.loss=kto"

    def row(self, values: dict[str, Any], task: Task | None) -> dict[str, Any]:
        verdict = values.pop("label")
        return {**plain_exchange(values, needs_answer=True, silence=not verdict), "desirable": verdict}


@row_format
class Feedback(Judged):
    name = "feedback"
    required = ("prompt", "completion", "label")
    optional = ("input", "history", *BESIDE)
    other_names: ClassVar = {
        "prompt": ("query", "instruction"),
        "completion": ("response", "output"),
        "label": ("kto_tag",),
        **OTHER_NAMES,
    }
    checks: ClassVar[dict[str, Check]] = {
        "prompt": text_or_messages,
        "completion": text_or_messages,
        "label": verdict_of,
    }

    def row(self, values: dict[str, Any], task: Task | None) -> dict[str, Any]:
        prompt = with_input(values["prompt"], values.pop("input", None))
        values["prompt"] = after_history(prompt, values.pop("history", None))
        return super().row(values, task)


@row_format
class FeedbackMessages(Judged):
    """A conversation with a verdict on its last message."""

    name = "feedback_messages"
    required = ("messages", "label")
    optional = BESIDE
    other_names: ClassVar = {
        "messages": ("conversations", "conversation"),
        "label": ("kto_tag",),
        **OTHER_NAMES,
    }
    checks: ClassVar[dict[str, Check]] = {"messages": conversation_of, "label": verdict_of}

    def row(self, values: dict[str, Any], task: Task | None) -> dict[str, Any]:
        values["prompt"], values["completion"] = parted(values.pop("messages"))
        return super().row(values, task)
