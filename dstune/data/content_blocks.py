"""Convert messages of Anthropic's API, where tool calls and results are blocks of the content, to OpenAI's form."""

from __future__ import annotations

from typing import Any

from dstune.data.problems import RowError, format_value


def without_blocks(message: Any) -> list[Any]:
    """Return one message for each `tool_result` block, then `message` with `tool_use` blocks as parts of the type `tool_call`.

    A message without such blocks stays as it is. Raises RowError if a result follows another block.
    """
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list) or not {"tool_use", "tool_result"}.intersection(map(_type, content)):
        return [message]
    results = [part for part in content if _type(part) == "tool_result"]
    others = [_as_call(part) if _type(part) == "tool_use" else part for part in content if part not in results]
    if content[: len(results)] != results:
        raise RowError("a block of type 'tool_result' follows one of another type, where results come first")
    return [*map(_as_message, results), *([{**message, "content": others}] if others else [])]


def with_parameters(tool: dict[str, Any]) -> dict[str, Any]:
    """Return the tool with its `input_schema` renamed to `parameters`, if it has one."""
    if "input_schema" not in tool or "parameters" in tool or "function" in tool:
        return tool
    return {"parameters" if key == "input_schema" else key: value for key, value in tool.items()}


def _type(part: Any) -> str:
    return str(part.get("type")) if isinstance(part, dict) else ""


def _as_call(part: dict[str, Any]) -> dict[str, Any]:
    function = {"name": part.get("name"), "arguments": part.get("input") or {}}
    identity = {"id": part["id"]} if part.get("id") else {}
    return {"type": "tool_call", "tool_call": {**identity, "type": "function", "function": function}}


def _as_message(part: dict[str, Any]) -> dict[str, Any]:
    content = part.get("content")
    if not isinstance(content, str | list | None):
        raise RowError(f"the content of a block of type 'tool_result' must be text, it is {format_value(content)}")
    identity = {"tool_call_id": part["tool_use_id"]} if part.get("tool_use_id") else {}
    return {"role": "tool", **identity, "content": content or ""}
