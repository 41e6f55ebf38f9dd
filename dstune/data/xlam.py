"""Convert rows of xLAM (Salesforce's function-calling data), whose tools list parameters by name with Python's types."""

from __future__ import annotations

import re
from typing import Any

from dstune.data.message import Message, from_json
from dstune.data.problems import RowError, format_value

TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
    "set": "array",
    "dict": "object",
}
"""Python's types by JSON Schema's names for them."""

_ITEMS = re.compile(r"(list|tuple|set)\[([a-z]+)\]")


def call_messages(query: str, answers: Any) -> list[Message]:
    """Return the question and the calls that answer it. Raises RowError."""
    if isinstance(answers, str):
        answers = from_json(answers, "answers are not JSON")
    if not isinstance(answers, list):
        raise RowError(f"answers must be a list of calls, they are {format_value(answers)}")
    question = {"role": "user", "content": query}
    if not answers:
        return [question, {"role": "assistant", "content": ""}]
    return [question, {"role": "assistant", "tool_calls": answers}]


def schemas(tools: Any) -> Any:
    """Return the tools with parameters that are listed by name converted to JSON Schema; others as they are. Raises RowError."""
    if isinstance(tools, str):
        tools = from_json(tools, "tools are not JSON")
    return [_schema(tool) for tool in tools] if isinstance(tools, list) else tools


def _schema(tool: Any) -> Any:
    parameters = tool.get("parameters") if isinstance(tool, dict) else None
    if not isinstance(parameters, dict) or "properties" in parameters:
        return tool
    if not all(isinstance(value, dict) for value in parameters.values()):
        return tool
    properties, required = {}, []
    for name, described in parameters.items():
        properties[name], optional = _parameter(described)
        required += [] if optional else [name]
    schema = {"type": "object", "properties": properties} | ({"required": required} if required else {})
    return {key: schema if key == "parameters" else value for key, value in tool.items()}


def _parameter(described: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the schema of a parameter, and whether a call may leave it out."""
    kind = described.get("type")
    if not isinstance(kind, str):
        return described, "default" in described
    name, *marks = (part.strip() for part in kind.split(", "))
    name, optional = name.lower(), "optional" in marks or "default" in described
    if items := _ITEMS.fullmatch(name):
        element = {"items": {"type": TYPES.get(items[2], items[2])}}
        return {**described, "type": TYPES[items[1]], **element}, optional
    outer = name.partition("[")[0]
    return {**described, "type": TYPES.get(outer, name)}, optional
