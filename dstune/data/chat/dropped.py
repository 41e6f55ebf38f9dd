"""Find the parts of a conversation that its chat template does not print, and so could not be trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dstune.data.chat.call_ids import with_call_ids
from dstune.data.chat.content_format import as_template_reads
from dstune.data.chat.probe import Facts
from dstune.data.chat.template import ChatTemplate, Messages, RenderError, Tools
from dstune.data.chat.turn_parts import END_MARKER, has_reasoning, with_text_at_end


def dropped_fields(facts: Facts, messages: Messages, tools: Tools | None) -> list[str]:
    """Return the names of what the conversation holds and the template never prints, apart from reasoning."""
    calls = [message["tool_calls"] for message in messages if message.get("tool_calls")]
    is_dropped_by_name = {
        "system messages": not facts.prints_system and messages[0]["role"] == "system",
        "tools that may be called": not facts.prints_tools and bool(tools),
        "what tools do (description, parameters)": facts.prints_tools
        and not facts.prints_schemas
        and any(map(_is_described, tools or [])),
        "tool calls": not facts.prints_calls and bool(calls),
        "more than one tool call of a message": facts.prints_calls
        and not facts.prints_several_calls
        and any(len(calls_of_message) > 1 for calls_of_message in calls),
        "results of tools": not facts.prints_results and any(message["role"] == "tool" for message in messages),
    }
    return [name for name, is_dropped in is_dropped_by_name.items() if is_dropped]


def refuse_unprinted_messages(
    template: ChatTemplate, messages: Messages, tools: Tools | None, arguments: Mapping[str, Any], unusual: int
) -> None:
    """Check that the template prints every user and system message, in order. Raises RenderError otherwise.

    unusual: index of the message whose role breaks the usual order. Of two messages with the same role in a row, some
    templates print only the last.
    """
    markers: list[str] = []
    marked = []
    for message in messages:
        content = message.get("content")
        if message["role"] in ("user", "system") and content:
            markers.append(f"{END_MARKER}{len(markers)}z")
            message = {**message, "content": with_text_at_end(content, markers[-1])}
        marked.append(message)
    text = template.text(marked, tools=tools, arguments=arguments)
    places = [text.find(marker) for marker in markers]
    if -1 in places or places != sorted(places):
        role, role_before = messages[unusual]["role"], messages[unusual - 1]["role"]
        raise RenderError(
            f"message {unusual + 1} has the role {role} after {role_before}, and the chat template does not print all messages "
            "of such a conversation; put their texts into one message, or set model.chat_template to one that does"
        )


def refuse_unprinted_parts(
    template: ChatTemplate, facts: Facts, messages: Messages, tools: Tools | None, arguments: Mapping[str, Any]
) -> None:
    """Check that the template prints the text parts of every content as text, if any content reaches it as a list.

    A template may read the parts of some roles only. Of others it prints the list as Python or JSON writes it, or the first part
    alone. Raises RenderError.
    """
    marked, parts_by_number = [], {}
    for number, message in enumerate(as_template_reads(messages, template.source(tools))):
        if isinstance(message.get("content"), list) and isinstance(messages[number]["content"], list):
            content = [
                {**part, "text": f"{part['text']}{END_MARKER}{number}p{place}z"} if "text" in part else part
                for place, part in enumerate(message["content"])
            ]
            message = {**message, "content": content}
            # Templates may leave the reasoning of earlier turns out.
            parts_by_number[number] = content[1:] if has_reasoning(messages[number]) else content
        marked.append(message)
    if not parts_by_number:
        return
    adapted = [facts.adapted(message) for message in with_call_ids(marked, facts.call_ids)]
    text = template.text(adapted, tools=tools, arguments=arguments)
    for number, parts in parts_by_number.items():
        name = f"message {number + 1} ({messages[number]['role']})"
        if any(form in text for part in parts for form in (repr(part), json.dumps(part), _as_jinja_writes(part))):
            reason = "the chat template prints the parts of its content as a list of objects (Python's form or JSON's)"
            raise RenderError(f"{name}: {reason}; {_ONE_TEXT}")
        for place, part in enumerate(parts, 1 + len(messages[number]["content"]) - len(parts)):
            if "text" in part and part["text"][part["text"].rindex(END_MARKER) :] not in text:
                raise RenderError(f"{name}: the chat template does not print its part {place}; {_ONE_TEXT}")


_ONE_TEXT = "give its content as one text, or set model.chat_template to a template that reads parts"


def _as_jinja_writes(part: Mapping[str, Any]) -> str:
    """Return what `part | tojson` prints in transformers' templates."""
    return json.dumps(part, ensure_ascii=False)


def _is_described(tool: Mapping[str, Any]) -> bool:
    """Return whether a tool's schema has a description or any parameters."""
    function = tool.get("function", tool)
    parameters = function.get("parameters") or {}
    return bool(function.get("description") or parameters.get("properties"))
