"""Write reasoning at the beginning of the content, for templates that have no field for it (`task.reasoning=inline`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dstune.core.errors import Problem, UserError
from dstune.data.chat.probe import Facts, prints_inline, reasoning_of
from dstune.data.chat.template import ChatTemplate, with_inlined_reasoning
from dstune.data.chat.thoughts import inlined
from dstune.data.chat.turn_parts import reasoning_marks
from dstune.data.message import REASONING_KEYS, content_start, with_start

_USUAL_MARKS = ("<think>", "</think>")

_FIX = "task.reasoning_marks='[<think>,</think>]', or what else opens and closes reasoning"


class InlineReasoning:
    """Knows between which marks, and in which turns, a template prints reasoning as the beginning of the content; picklable.

    configured_marks: those of `task.reasoning_marks`; empty if unset. is_used: whether the run inlines reasoning.
    Raises UserError if the run needs marks and none are known, or if the configured ones are not two texts.
    """

    def __init__(self, template: ChatTemplate, facts: Facts, configured_marks: Sequence[str], *, is_used: bool):
        self._facts = facts
        self.marks = _marks(template, configured_marks)
        if self.marks is None and is_used and facts.reasons_in != {True, False}:
            reason = "neither the chat template nor the vocabulary has marks of reasoning"
            raise UserError(Problem("task.reasoning_marks", reason, _FIX))
        self.printed_in = prints_inline(template, facts, self.marks or _USUAL_MARKS)
        """The kinds of turns that print it: turns that call tools (True), other turns (False)."""

    @property
    def fix(self) -> str:
        """The part of a message that proposes `task.reasoning=inline`."""
        marks = "...".join(self.marks) if self.marks else f"with task.reasoning_marks='[{','.join(_USUAL_MARKS)}]'"
        return f"task.reasoning=inline writes it into the content ({marks})"

    def adapted(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return `message` with its reasoning at the beginning of its content if the template prints it there and has no field
        for it; otherwise unchanged."""
        reasoning = reasoning_of(message) if message["role"] == "assistant" else None
        calls = bool(message.get("tool_calls"))
        if reasoning is None or self.marks is None or calls in self._facts.reasons_in or calls not in self.printed_in:
            return message
        other_keys = {key: value for key, value in message.items() if key not in REASONING_KEYS}
        content = message.get("content")
        return {**other_keys, "content": with_start(content, inlined(content_start(content), reasoning, self.marks))}

    def rewrite_template(self, tokenizer: Any) -> None:
        """Change the tokenizer's chat template so that it prints a reasoning field the way the run trained it."""
        if self.marks is None:
            return
        marks, turns = self.marks, self.printed_in - self._facts.reasons_in
        template = tokenizer.chat_template
        tokenizer.chat_template = (
            with_inlined_reasoning(template, marks, turns)
            if isinstance(template, str)
            else {name: with_inlined_reasoning(text, marks, turns) for name, text in template.items()}
        )


def _marks(template: ChatTemplate, configured_marks: Sequence[str]) -> tuple[str, str] | None:
    """Return the opening and closing mark: those configured, otherwise those of the template or the vocabulary."""
    if len(configured_marks) == 2 and all(configured_marks):
        opening, closing = configured_marks
        return opening, closing
    if configured_marks:
        value = str(list(configured_marks))
        raise UserError(Problem("task.reasoning_marks", "these have to be two texts", _FIX, value))
    return reasoning_marks(template)
