"""Find the parts of a conversation that its chat template does not print, and so could not be trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstune.data.chat.probe import Facts
from dstune.data.chat.template import ChatTemplate, Messages, RenderError, Tools
from dstune.data.chat.turn_parts import END_MARKER, with_text_at_end


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


def _is_described(tool: Mapping[str, Any]) -> bool:
    """Return whether a tool's schema has a description or any parameters."""
    function = tool.get("function", tool)
    parameters = function.get("parameters") or {}
    return bool(function.get("description") or parameters.get("properties"))
