"""Convert conversations of Gemini's API (`contents` with `parts`) and its function declarations to OpenAI's messages and tools."""

from __future__ import annotations

import json
from typing import Any

from dstune.data.message import Message, from_json, without_none
from dstune.data.problems import RowError, format_value

ROLES = {"user": "user", "model": "assistant", "function": "user"}
"""OpenAI's role for the role of a content. Results of functions come in contents of `user` or `function`."""

NO_CONTENT = ("thoughtSignature", "thought_signature")
"""Keys of a part that hold no content."""

MEDIA = ("inlineData", "inline_data", "fileData", "file_data")
DECLARATIONS = ("functionDeclarations", "function_declarations")
PARAMETERS = ("parameters", "parametersJsonSchema", "parameters_json_schema")


def messages_of_contents(value: Any, column: str) -> list[Message]:
    """Return the messages of a list of contents. Raises RowError.

    Parts may be text, thoughts (`thought: true`), `functionCall` and `functionResponse`; any other part is an error.
    """
    if isinstance(value, str):
        value = from_json(value, f"column {column!r} is text but not JSON")
    contents = [value] if isinstance(value, dict) else value
    if not isinstance(contents, list) or not contents:
        raise RowError(f"column {column!r} must be a list of contents that is not empty")
    return [message for number, content in enumerate(contents, 1) for message in _messages_of(number, content)]


def system_text(value: Any, column: str) -> str:
    """Return the text of a `systemInstruction`: a text, or a content with parts of text. Raises RowError."""
    if isinstance(value, str):
        return value
    content = without_none(value)
    parts = content.get("parts") if isinstance(content, dict) else None
    parts = [parts] if isinstance(parts, dict) else parts
    if not isinstance(parts, list) or not all(isinstance(part, dict) and set(part) == {"text"} for part in parts):
        raise RowError(f"column {column!r} must be text or a content with parts of text, it is {format_value(value)}")
    return "\n".join(str(part["text"]) for part in parts)


def tools_of_declarations(value: Any) -> Any:
    """Return the tools of `[{functionDeclarations: [...]}]`; tools in OpenAI's form stay. Raises RowError for tools that Google
    runs itself."""
    if isinstance(value, str):
        value = from_json(value, "tools are not JSON")
    groups = without_none([value] if isinstance(value, dict) else value)
    if not isinstance(groups, list):
        return value
    return [tool for group in groups for tool in _tools_of_group(group)]


def _tools_of_group(group: Any) -> list[Any]:
    if isinstance(group, dict) and ("function" in group or "name" in group):
        return [group]
    declarations = _declared(group) if isinstance(group, dict) else None
    others = [key for key in group if key not in DECLARATIONS] if isinstance(group, dict) else []
    if others or not isinstance(declarations, list) or not all(isinstance(item, dict) for item in declarations):
        faulty = repr(others[0]) if others else format_value(group)
        raise RowError(f"tools hold {faulty}, which is no list of functionDeclarations")
    return [_tool(declaration) for declaration in declarations]


def _declared(group: dict[str, Any]) -> Any:
    return next((group[key] for key in DECLARATIONS if key in group), None)


def _tool(declaration: dict[str, Any]) -> dict[str, Any]:
    function = {
        "parameters" if key in PARAMETERS else key: _schema(value) if key in PARAMETERS else value
        for key, value in declaration.items()
    }
    return {"type": "function", "function": function}


def _schema(schema: Any, *, names: bool = False) -> Any:
    """Return a schema with its types in lower case, as in JSON Schema. names: whether its keys are names of arguments."""
    if isinstance(schema, list):
        return [_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value.lower()
        if key == "type" and not names and isinstance(value, str)
        else _schema(value, names=key == "properties" and not names)
        if isinstance(value, dict | list) and (names or key not in ("default", "example", "enum"))
        else value
        for key, value in schema.items()
    }


def _messages_of(number: int, content: Any) -> list[Message]:
    content = without_none(content, ("args", "response"))
    parts = content.get("parts") if isinstance(content, dict) else None
    parts = [parts] if isinstance(parts, dict) else parts
    if not isinstance(content, dict) or not isinstance(parts, list):
        raise RowError(f"content {number} must be an object with role and parts")
    name = content.get("role") or "user"
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowError(f"content {number} has the unknown role {name!r}; roles are {', '.join(ROLES)}")
    results: list[Message] = []
    others: list[dict[str, Any]] = []
    for part in parts:
        kind, converted = _part(number, name, part)
        if kind != "result":
            others.append(converted)
        elif others:
            raise RowError(
                f"content {number} has a functionResponse behind a part of another kind, where results come first"
            )
        else:
            results.append(converted)
    other_keys = {key: value for key, value in content.items() if key not in ("role", "parts")}
    if results and not others:
        return results
    return [*results, {"role": role, **other_keys, "content": others}]


def _part(number: int, role: str, part: Any) -> tuple[str, dict[str, Any]]:
    """Return the kind of a part (`text`, `reasoning`, `call` or `result`) and its form for OpenAI: a part, for a result a message.
    Raises RowError."""
    keys = [key for key in part if key not in (*NO_CONTENT, "thought")] if isinstance(part, dict) else []
    if set(keys) & set(MEDIA):
        raise RowError(
            f"content {number} ({role}) holds an image, audio or video, which dstune does not read from Gemini's parts"
        )
    value = part[keys[0]] if len(keys) == 1 else None
    match keys:
        case ["text"] if isinstance(value, str):
            kind = "reasoning" if part.get("thought") else "text"
            return kind, {"type": kind, "text": value}
        case ["functionCall" | "function_call"] if isinstance(value, dict):
            function = {"name": value.get("name"), "arguments": value.get("args") or {}}
            identity = {"id": value["id"]} if value.get("id") else {}
            return "call", {"type": "tool_call", "tool_call": {**identity, "type": "function", "function": function}}
        case ["functionResponse" | "function_response"] if isinstance(value, dict):
            identity = {"tool_call_id": value["id"]} if value.get("id") else {}
            name_field = {"name": value["name"]} if value.get("name") else {}
            answer = value.get("response")
            text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
            return "result", {"role": "tool", **name_field, **identity, "content": text}
    raise RowError(
        f"content {number} ({role}) has a part with {' and '.join(map(repr, keys)) or format_value(part)}; text, functionCall and "
        "functionResponse are read"
    )
