"""The fields of requests: what each may hold, and which of them a route knows.

A request may hold nothing else. What an engine would ignore is refused by name, unless the value asks for nothing
(`n=1`, `response_format={"type": "text"}`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from dstune.core.parsing import parse_json
from dstune.data.messages import NO_ARGUMENTS
from dstune.serve.errors import ApiError
from dstune.serve.gateway.json_bounds import MOST_MEMBERS, members_in

Check = Callable[[Any], str]
"""What is wrong with a value; empty where nothing is."""

MOST_MESSAGES = 2048
MOST_INPUTS = 2048
MOST_CONVERSATIONS = 64
MOST_STOPS = 4
TEMPLATE_NAMES = NO_ARGUMENTS | {"documents"}
"""What a client may not give to the template."""


def _number(least: float, most: float, *, whole: bool = False) -> Check:
    def check(value: Any) -> str:
        kind = int if whole else int | float
        if isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most:
            return ""
        return f"must be {'a whole' if whole else 'a'} number from {least:g} to {most:g}"

    return check


def _flag(value: Any) -> str:
    return "" if isinstance(value, bool) else "must be true or false"


def _text(most: int) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, str):
            return "must be text"
        return "" if len(value) <= most and _encodable(value) else f"must be UTF-8 text of at most {most} characters"

    return check


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _one_of(*values: Any) -> Check:
    return lambda value: "" if value in values else f"must be {' or '.join(map(repr, values))}"


def _stop(value: Any) -> str:
    texts = [value] if isinstance(value, str) else value
    good = isinstance(texts, list) and len(texts) <= MOST_STOPS and all(isinstance(text, str) for text in texts)
    if not good:
        return f"must be text, or a list of at most {MOST_STOPS}"
    return (
        ""
        if all(0 < len(text) <= 256 and _encodable(text) for text in texts)
        else "must be texts of 1 to 256 characters"
    )


def _bias(value: Any) -> str:
    if not isinstance(value, dict) or len(value) > 1024:
        return "must be an object of at most 1024 tokens"
    if not all(re.fullmatch(r"\d{1,9}", str(token)) for token in value):
        return "names of its fields must be token ids"
    return next((problem for bias in value.values() if (problem := _number(-100, 100)(bias))), "")


def _content(value: Any, *, may_be_null: bool) -> str:
    if value is None:
        return "" if may_be_null else "needs content"
    if isinstance(value, str):
        return "" if _encodable(value) else "content must be UTF-8 text"
    if not isinstance(value, list) or len(value) > MOST_MESSAGES:
        return "content must be text, or a list of text parts"
    for part in value:
        if not isinstance(part, dict) or part.get("type") not in ("text", "refusal"):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            return f"has a content part of type {str(kind)[:40]!r}; only text is served"
        if unknown := set(part) - {"type", "text", "refusal"}:
            return f"has the unknown field {min(unknown)[:60]!r} in a content part"
        if not isinstance(part.get(part["type"]), str) or not _encodable(part[part["type"]]):
            return "has a text part without text"
    return ""


MESSAGE_FIELDS = {
    "system": {"role", "content", "name"},
    "developer": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "tool_calls", "refusal", "reasoning_content"},
    "tool": {"role", "content", "tool_call_id", "name"},
}


def _messages(value: Any) -> str:
    if not isinstance(value, list) or not value or len(value) > MOST_MESSAGES:
        return f"must be a list of 1 to {MOST_MESSAGES} messages"
    members = 0
    for number, message in enumerate(value):
        members += sum(map(members_in, _arguments_of(message)))
        if members > MOST_MEMBERS:
            return f"[{number}] tool calls hold more than {MOST_MEMBERS:,} objects, lists and members"
        if problem := _message(message):
            return f"[{number}] {problem}"
    return ""


def _arguments_of(message: Any) -> Iterator[bytes]:
    """The JSON texts in a message that may be anything."""
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            yield function["arguments"].encode("utf-8", "replace")


def _given(value: Mapping[str, Any]) -> set[str]:
    return {key for key, item in value.items() if item is not None}


def _message(message: Any) -> str:
    if not isinstance(message, dict):
        return "must be an object"
    role = message.get("role")
    known = MESSAGE_FIELDS.get(role) if isinstance(role, str) else None
    if known is None:
        return f"has the unknown role {str(role)[:40]!r}; roles are {', '.join(MESSAGE_FIELDS)}"
    if unknown := _given(message) - known:
        return f"({role}) has the unknown field {min(unknown)[:60]!r}"
    calls = message.get("tool_calls")
    if calls is not None and (problem := _calls(calls)):
        return problem
    for name in ("name", "tool_call_id", "refusal", "reasoning_content"):
        if message.get(name) is not None and (problem := _text(1_000_000)(message[name])):
            return f"({role}) {name} {problem}"
    if message.get("refusal") and message.get("content"):
        return f"({role}) has a content and a refusal"
    may_be_null = role == "assistant" and bool(calls or message.get("refusal"))
    problem = _content(message.get("content"), may_be_null=may_be_null)
    return f"({role}) {problem}" if problem else ""


def _calls(calls: Any) -> str:
    if not isinstance(calls, list) or not calls or len(calls) > 128:
        return "tool_calls must be a list of 1 to 128 calls"
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return "a tool call needs a function with a name"
        if not isinstance(function.get("arguments"), str) or not isinstance(_json(function["arguments"] or "{}"), dict):
            return "the arguments of a tool call must be the JSON text of an object"
    return ""


def _json(text: str) -> Any:
    """None where it is no JSON."""
    try:
        return parse_json(text)
    except ValueError:
        return None


def _tools(value: Any) -> str:
    if not isinstance(value, list) or len(value) > 128:
        return "must be a list of at most 128 tools"
    for number, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict):
            return f'[{number}] must be {{"type": "function", "function": {{...}}}}'
        if not isinstance(function.get("name"), str) or not re.fullmatch(r"[\w-]{1,64}", function["name"]):
            return f"[{number}] needs a name of 1 to 64 letters, digits, _ and -"
        if function.get("strict"):
            return f"[{number}] strict: arguments are not constrained to a schema here"
        if not isinstance(function.get("parameters", {}), dict):
            return f"[{number}] parameters must be a JSON schema"
        if unknown := set(function) - {"name", "description", "parameters", "strict"}:
            return f"[{number}] has the unknown field {min(unknown)[:60]!r}"
    return ""


def _tool_choice(value: Any) -> str:
    if value in ("none", "auto", "required"):
        return ""
    named = isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("function"), dict)
    return (
        "" if named and isinstance(value["function"].get("name"), str) else "must be none, auto, required or a function"
    )


def _object(*names: str) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, dict):
            return "must be an object"
        unknown = set(value) - set(names)
        return f"has the unknown field {min(unknown)[:60]!r}" if names and unknown else ""

    return check


def _stream_options(value: Any) -> str:
    problem = _object("include_usage")(value)
    return problem or _flag(value.get("include_usage", False))


def _template_kwargs(value: Any) -> str:
    if not isinstance(value, dict) or len(value) > 16:
        return "must be an object of at most 16 arguments"
    for name, item in value.items():
        if not re.fullmatch(r"[A-Za-z_]\w{0,63}", name):
            return f"has a name that is none: {name[:60]!r}"
        if name in TEMPLATE_NAMES:
            return f"{name!r} is not an argument of the template"
        if not isinstance(item, bool | int | float | str) or (isinstance(item, str) and len(item) > 1000):
            return f"{name!r} must be true, false, a number or a short text"
    return ""


def _response_format(value: Any) -> str:
    if not isinstance(value, dict) or value.get("type") not in ("text", "json_object", "json_schema"):
        return 'must be an object with the type "text", "json_object" or "json_schema"'
    # What stands elsewhere is a schema for one engine and nothing for another.
    schema = value["type"] == "json_schema"
    if unknown := _given(value) - {"type", *(["json_schema"] if schema else [])}:
        return f"has the unknown field {min(unknown)[:60]!r} for the type {value['type']!r}"
    if not schema:
        return ""
    given = value.get("json_schema")
    if not isinstance(given, dict) or not isinstance(given.get("schema"), dict):
        return "needs json_schema.schema, a JSON schema"
    unknown = _given(given) - {"name", "description", "schema", "strict"}
    return f"has the unknown field {min(unknown)[:60]!r} in json_schema" if unknown else ""


def _prompt(value: Any) -> str:
    if isinstance(value, str):
        return "" if value and _encodable(value) else "must not be empty"
    if not isinstance(value, list) or not value or len(value) > 262_144:
        return "must be text, token ids, or a list of these"
    if all(isinstance(item, str) for item in value):
        return "" if all(value) and all(map(_encodable, value)) else "holds an empty text"
    rows = [value] if all(type(item) is int for item in value) else value
    good = all(isinstance(row, list) and row and all(type(item) is int and item >= 0 for item in row) for row in rows)
    return "" if good else "must be text, token ids, or a list of these"


def _response_input(value: Any) -> str:
    """Of `/v1/responses`: a text, or messages."""
    if isinstance(value, str):
        return "" if value and _encodable(value) else "must not be empty"
    if not isinstance(value, list) or not 0 < len(value) <= MOST_MESSAGES:
        return f"must be a text, or a list of 1 to {MOST_MESSAGES} messages"
    for number, item in enumerate(value):
        if not isinstance(item, dict) or item.get("type", "message") != "message":
            return f"[{number}] must be a message; only text is served"
        if set(item) - {"type", "role", "content"} or item.get("role") not in (
            "system",
            "developer",
            "user",
            "assistant",
        ):
            return f"[{number}] must have a role and content, and nothing else"
        content = item.get("content")
        parts = [{"type": "input_text", "text": content}] if isinstance(content, str) else content
        for part in parts if isinstance(parts, list) else [content]:
            if not isinstance(part, dict) or set(part) - {"type", "text", "annotations"}:
                return f"[{number}] has content that is no text"
            text = part.get("text")
            if part.get("type") not in ("input_text", "output_text") or not isinstance(text, str):
                return f"[{number}] has content that is no text"
            if not _encodable(text):
                return f"[{number}] content must be UTF-8 text"
    return ""


def _inputs(value: Any) -> str:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not 0 < len(texts) <= MOST_INPUTS:
        return f"must be a text, or a list of 1 to {MOST_INPUTS}"
    if not all(isinstance(text, str) for text in texts):
        return "must hold texts; token ids are not taken"
    return "" if all(text.strip() and _encodable(text) for text in texts) else "holds an empty text"


def _conversations(value: Any) -> str:
    """Messages, or a list of such lists."""
    if not (isinstance(value, list) and value and all(isinstance(row, list) for row in value)):
        return _messages(value)
    if len(value) > MOST_CONVERSATIONS:
        return f"must be at most {MOST_CONVERSATIONS} conversations"
    return next((f"[{number}] {problem}" for number, row in enumerate(value) if (problem := _messages(row))), "")


def _words(value: Any) -> str:
    rows = value if isinstance(value, list) else [value]
    if not rows or len(rows) > MOST_INPUTS:
        return f"must be texts or lists of words, 1 to {MOST_INPUTS}"
    for row in rows:
        words = row.split() if isinstance(row, str) else row
        if not isinstance(words, list) or not words or not all(isinstance(w, str) and w.strip() for w in words):
            return "must be texts, or lists of words that are not empty"
    return ""


_LABEL = _text(256)
_SAMPLING: dict[str, Check] = {
    "temperature": _number(0, 2),
    "top_p": _number(1e-6, 1),
    "top_k": _number(-1, 1_000_000, whole=True),
    "min_p": _number(0, 1),
    "seed": _number(-(2**63), 2**63 - 1, whole=True),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0.1, 10),
    "logit_bias": _bias,
    "stop": _stop,
    "n": _number(1, 128, whole=True),
    "stream": _flag,
    "stream_options": _stream_options,
    "user": _LABEL,
    "return_token_ids": _flag,
}
CHAT: dict[str, Check] = {
    "model": _LABEL,
    "messages": _messages,
    **_SAMPLING,
    "max_tokens": _number(1, 10_000_000, whole=True),
    "max_completion_tokens": _number(1, 10_000_000, whole=True),
    "logprobs": _flag,
    "top_logprobs": _number(0, 20, whole=True),
    "tools": _tools,
    "tool_choice": _tool_choice,
    "parallel_tool_calls": _flag,
    "response_format": _response_format,
    "chat_template_kwargs": _template_kwargs,
    "modalities": _one_of(["text"]),
    "store": _flag,
    "metadata": _object(),
    "reasoning_effort": _LABEL,
    "verbosity": _LABEL,
    "service_tier": _LABEL,
    "safety_identifier": _LABEL,
    "prompt_cache_key": _LABEL,
}
COMPLETION: dict[str, Check] = {
    "model": _LABEL,
    "prompt": _prompt,
    **_SAMPLING,
    "max_tokens": _number(1, 10_000_000, whole=True),
    "logprobs": _number(0, 20, whole=True),
    "echo": _flag,
    "best_of": _number(1, 128, whole=True),
    "suffix": _text(100_000),
}
RESPONSE: dict[str, Check] = {
    "model": _LABEL,
    "input": _response_input,
    "instructions": _text(1_000_000),
    "max_output_tokens": _number(1, 10_000_000, whole=True),
    "temperature": _number(0, 2),
    "top_p": _number(1e-6, 1),
    "stream": _flag,
    "store": _flag,
    "user": _LABEL,
    "safety_identifier": _LABEL,
    "metadata": _object(),
    "parallel_tool_calls": _flag,
    "service_tier": _LABEL,
    "truncation": _one_of("auto", "disabled"),
    "background": _flag,
}
"""Without what refers to answers that a server keeps: none is kept."""
EMBEDDING: dict[str, Check] = {
    "model": _LABEL,
    "input": _inputs,
    "encoding_format": _one_of("float", "base64"),
    "dimensions": _number(1, 65536, whole=True),
    "user": _LABEL,
}
CLASSIFY: dict[str, Check] = {"model": _LABEL, "input": _inputs, "user": _LABEL}
MODERATION: dict[str, Check] = {"model": _LABEL, "input": _inputs}
TAG: dict[str, Check] = {"model": _LABEL, "input": _words, "user": _LABEL}
RERANK: dict[str, Check] = {
    "model": _LABEL,
    "query": _text(1_000_000),
    "documents": _inputs,
    "texts": _inputs,
    "top_n": _number(1, MOST_INPUTS, whole=True),
    "return_documents": _flag,
    "return_text": _flag,
    "raw_scores": _flag,
    "user": _LABEL,
}
ANSWER: dict[str, Check] = {"model": _LABEL, "question": _inputs, "context": _inputs, "user": _LABEL}
REWARD: dict[str, Check] = {"model": _LABEL, "messages": _conversations, "user": _LABEL}
SCORE: dict[str, Check] = {"model": _LABEL, "text_1": _inputs, "text_2": _inputs, "user": _LABEL}

REQUIRED = ("messages", "prompt", "input", "query", "text_1", "text_2", "question", "context")

NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "n": lambda value: value == 1,
    "best_of": lambda value: value == 1,
    "stream": lambda value: value is False,
    "echo": lambda value: value is False,
    "logprobs": lambda value: value is False,
    "logit_bias": lambda value: not value,
    "stop": lambda value: not value,
    "tools": lambda value: not value,
    "tool_choice": lambda value: value in ("auto", "none"),
    "parallel_tool_calls": lambda value: value is True,
    "response_format": lambda value: value.get("type") == "text",
    "presence_penalty": lambda value: value == 0,
    "frequency_penalty": lambda value: value == 0,
    "repetition_penalty": lambda value: value == 1,
    "top_k": lambda value: value in (0, -1),
    "min_p": lambda value: value == 0,
    "suffix": lambda value: not value,
    "modalities": lambda value: value == ["text"],
    "store": lambda value: value is False,
    "metadata": lambda value: not value,
    "service_tier": lambda value: value in ("auto", "default"),
    "truncation": lambda value: value == "disabled",
    "background": lambda value: value is False,
    "verbosity": lambda value: value == "medium",
    "reasoning_effort": lambda value: value == "none",
    "return_token_ids": lambda value: value is False,
    "chat_template_kwargs": lambda value: not value,
    "encoding_format": lambda value: value == "float",
    "return_documents": lambda value: value is False,
    "return_text": lambda value: value is False,
    "raw_scores": lambda value: value is False,
}
"""Values at which a field asks for nothing, so that any engine may leave it out."""


def _as_trained(value: Any) -> Any:
    """Messages as rows of training hold them: a content of one part is a text, several stay parts, which templates print in
    their own way; a refusal is what was said, since engines know of none."""
    if not isinstance(value, list):
        return value
    return [_as_trained(item) if isinstance(item, list) else _message_as_trained(item) for item in value]


def _message_as_trained(message: dict[str, Any]) -> dict[str, Any]:
    content, refusal = message.get("content"), message.get("refusal")
    if isinstance(content, list):
        parts = [
            {"type": _PART_TYPES.get(part["type"], "text"), "text": part.get(part["type"], part.get("text"))}
            for part in content
        ]
        content = parts if len(parts) > 1 else "".join(part["text"] for part in parts)
    kept = {name: value for name, value in message.items() if name != "refusal"}
    if refusal or "content" in message:
        kept["content"] = refusal or content
    if message.get("tool_calls"):
        kept["tool_calls"] = [_with_arguments(call) for call in message["tool_calls"]]
    return kept


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Clients that gather a stream send "" for a call without arguments."""
    function = call["function"]
    return call if function["arguments"] else call | {"function": function | {"arguments": "{}"}}


_PART_TYPES = {name: name for name in ("input_text", "output_text")}
"""Types of parts in `/v1/responses`; all others are `text`."""

MESSAGES = {_messages, _conversations, _response_input}
"""Checks of fields that hold messages."""


def checked(body: Mapping[str, Any], known: Mapping[str, Check], acts: Collection[str]) -> dict[str, Any]:
    """`body` without fields that ask for nothing, its messages as in training. known: the fields of the route. acts: those
    that the engine acts on.

    Raises ApiError for the first field that is unknown, wrong, or that the engine would ignore.
    """
    kept: dict[str, Any] = {}
    for name, value in body.items():
        if name not in known:
            raise ApiError(400, f"Unknown field: {name[:80]!r}.", param=name[:80], code="unknown_parameter")
        if value is None:
            continue
        if problem := known[name](value):
            raise ApiError(400, f"Invalid {name}: {problem}.", param=name, code="invalid_value")
        if name in acts:
            kept[name] = _as_trained(value) if known[name] in MESSAGES else value
        elif not (name in NEUTRAL and NEUTRAL[name](value)):
            raise ApiError(
                400, f"This model does not support {name!r} with this value.", param=name, code="unsupported_parameter"
            )
    for name in REQUIRED:
        if name in known and name not in kept:
            raise ApiError(400, f"Missing required field: {name!r}.", param=name, code="missing_required_parameter")
    return kept
