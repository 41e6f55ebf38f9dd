"""Compare the parts of a message (reasoning, content, calls) with what the template prints for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from dstune.data.chat.probe import reasoning_of
from dstune.data.chat.rule import Turn, behind_message
from dstune.data.chat.template import ChatTemplate, Messages, RenderError, Tools
from dstune.data.chat.thoughts import marks_of
from dstune.data.message import REASONING_KEYS, content_start, inline_reasoning, with_start

Render = Callable[..., str]
"""`ChatTemplate.text` or `ChatTemplate.direct`."""

END_MARKER = "qzmessageend"
"""Text that is appended to a message to find where the template prints its end."""


def has_reasoning(message: Mapping[str, Any]) -> bool:
    """Return whether a message has reasoning, in a separate field or at the start of its content."""
    if reasoning_of(message) is not None:
        return True
    inline = inline_reasoning(content_start(message.get("content")))
    return bool(inline and inline[0].strip())


def reasoning_marks(template: ChatTemplate) -> tuple[str, str] | None:
    """Return the reasoning marks of the template, otherwise of the vocabulary, otherwise of the tokenizer's `response_schema`."""
    tokens = {token.content for token in template.tokenizer.added_tokens_decoder.values()}
    # The patterns by which transformers parses an answer contain the marks.
    schema = json.dumps(getattr(template.tokenizer, "response_schema", None), ensure_ascii=False, default=str)
    return marks_of(template.source(None), tokens) or marks_of(schema, ())


def without_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Return an assistant's message without its reasoning; other messages stay as they are."""
    if message["role"] != "assistant":
        return message
    remaining = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    if inline := inline_reasoning(content_start(remaining.get("content"))):
        remaining["content"] = with_start(remaining["content"], inline[1].lstrip())
    return remaining


def unprinted_part(turn: Turn, message: Mapping[str, Any]) -> str | None:
    """Return the name of the first part of the assistant's message that the template does not print in its turn; None if it
    prints all."""
    content = message.get("content")
    start = content_start(content)
    reasoning = reasoning_of(message)
    inline = None if reasoning else inline_reasoning(start)
    output = {"reasoning": reasoning or (inline[0] if inline else ""), "content": inline[1] if inline else start}
    if isinstance(content, list):
        output |= {f"part {number} of its content": part["text"] for number, part in enumerate(content[1:], 2)}
    for function in (call["function"] for call in message.get("tool_calls") or []):
        name, arguments = function["name"], function["arguments"]
        output[f"call of {name}"] = name
        if isinstance(arguments, dict):  # arguments given as text are printed unchanged or not at all
            output |= {f"argument {key} of {name}": key for key in arguments if key.isidentifier()}
    return next((name_of_part for name_of_part, text in output.items() if text.strip() not in turn.body), None)


def text_behind_prompt(
    messages: Messages, prompt: str, answered: str, arguments: Mapping[str, Any], tools: Tools | None, render: Render
) -> str | None:
    """Return the text of the last message if its prompt is no prefix of the rendered conversation; None if that is ambiguous.

    A marker at the end of the message before it shows where the prompt and the conversation have both printed that message.
    """
    *earlier, last, turn = messages
    content = last.get("content")
    ends_with_text = isinstance(content, str) or (content and "text" in content[-1])
    if not content or not ends_with_text or END_MARKER in prompt or END_MARKER in answered:
        return None
    marked = [*earlier, {**last, "content": with_text_at_end(content, END_MARKER)}]
    try:
        texts = [
            render(marked, tools=tools, arguments=arguments, prompt=True),
            render([*marked, turn], tools=tools, arguments=arguments),
        ]
        closed = render(marked, tools=tools, arguments=arguments).rpartition(END_MARKER)[2]
    except RenderError:
        return None
    tails = [text.rpartition(END_MARKER)[2] for text in texts]
    renderings = zip((prompt, answered), texts, tails, strict=True)
    if not all(END_MARKER in text and original.endswith(tail) for original, text, tail in renderings):
        return None
    return behind_message(tails[0], tails[1], closed, thinks=has_reasoning(turn))


def with_text_at_end(content: Any, text: str) -> Any:
    """Return `content` with `text` appended to it."""
    if isinstance(content, list):
        if "text" not in content[-1]:  # an image
            return [*content, {"type": "text", "text": text}]
        return [*content[:-1], {**content[-1], "text": content[-1]["text"] + text}]
    return content + text
