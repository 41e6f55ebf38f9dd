"""Normalise one message of a conversation from the forms in files (OpenAI, ShareGPT, LLaMA-Factory) to what chat templates read.

The result has `role`, `content` (a text, or a list of parts if there are several), and where they apply `reasoning_content`,
`tool_calls` with arguments as an object, and `weight: 0` if the message is not trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from dstune.core.parsing import parse_json
from dstune.data import media
from dstune.data.images.places import SPEAKERS, part_of_image
from dstune.data.problems import RowError, format_value

Message = dict[str, Any]
Content = str | list[dict[str, Any]]
"""A text, or parts `{type: text, text}` and `{type: image}`, which each template prints in its own way (`chat.content_format`)."""

ROLES = ("system", "user", "assistant", "tool")

ROLE_NAMES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""The role for each name in a file. `developer` is OpenAI's newer name for `system`, which most templates do not know."""

INSTEAD = {"from": "role", "value": "content", "refusal": "content", "function_call": "tool_calls"}
"""Alternative keys in files, and the keys of a message that they stand for."""

NAMES_OF_CALLS = ("function_call", "tool_call")
"""Roles of a message that is itself a call, as JSON text."""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names in data and templates for what a model thinks before it answers."""

WEIGHT_KEYS = ("weight", "loss_weight", "loss")
"""Names of the weight in the loss: OpenAI's, LLaMA-Factory's and ms-swift's."""

OTHER_WEIGHTS = ("train", "training", "train_detail", "trainable", "masked", "mask", "loss_mask")
"""Further names of the weight, whose values differ in meaning between tools; they are refused."""

PARTS = {
    "text": "text",
    "refusal": "text",
    "input_text": "text",
    "output_text": "text",
    "reasoning": "reasoning",
    "thinking": "reasoning",
    "tool_call": "call",
}
"""What a part of a content holds, by its type."""

BESIDE_FUNCTION = ("id", "type")
"""Keys of a call that do not belong to its function."""

ORDER = ("reasoning", "text", "call")
"""The order in which templates write the kinds of parts of a message."""


_PYTHON = re.compile(r"\s*\[?\s*\{\s*'")
"""The beginning of Python's text form of an object, as pandas writes it into a CSV file."""


def message_of(number: int, message: Any) -> Message:
    """Return the message that is called `number`, its keys in the order of the file. Raises RowError."""
    if not isinstance(message, dict):
        raise RowError(f"message {number} must be an object with role and content")
    message = without_none(message, GIVEN)
    places = {INSTEAD.get(key, key): place for place, key in enumerate(message)}
    name = message.pop("role", None) or message.pop("from", None)
    role = ROLE_NAMES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowError(f"message {number} has the unknown role {name!r}; roles are {', '.join(ROLES)}")
    media.refuse_columns(message, f"message {number} ({role})")
    value = message.pop("value", None)
    content = message.pop("content", value)
    if value not in (None, content):
        raise RowError(f"message {number} ({role}) has a content and a value that say different things")
    weight = _weight(number, role, message)
    if isinstance(content, list):
        content = _from_parts(number, role, content, message)
    calls = _calls(number, name, role, message, content)
    result: Message = {"role": role}
    if refusal := message.pop("refusal", None):
        if content:
            raise RowError(f"message {number} ({role}) has a content and a refusal")
        content = refusal
    if name not in NAMES_OF_CALLS and not (calls and content is None):
        result["content"] = content if isinstance(content, list) else _text(number, role, content)
    if message.pop("prefix", None):
        raise RowError(
            f"message {number} ({role}) is a prefix that the answer continues (continue_final_message); give the message as a "
            "whole"
        )
    for key in REASONING_KEYS if role == "assistant" else ():
        if not isinstance(message.get(key, ""), str):
            raise RowError(f"message {number} ({role}): {key} must be text, it is {format_value(message[key])}")
    if role == "assistant":
        _refuse_two_reasonings(number, message, result.get("content"))
    for key in OTHER_WEIGHTS:
        if key in message:
            # Other tools use this name for the weight: if it were ignored, the message would be trained.
            raise RowError(f"message {number} has the key {key!r}; what is not to be trained is marked with weight: 0")
    result |= {key: value for key, value in message.items() if key not in ("tool_calls", "function_call")}
    if calls:
        result["tool_calls"] = calls
    if not weight:
        result["weight"] = 0
    return {key: result[key] for key in sorted(result, key=lambda key: places.get(key, len(places)))}


def _refuse_two_reasonings(number: int, message: Message, content: Content | None) -> None:
    """Raise RowError if a message has reasoning twice: a template would print only one, or both."""
    filled_keys = [key for key in REASONING_KEYS if message.get(key, "").strip()]
    if len({message[key].strip() for key in filled_keys}) > 1:
        raise RowError(
            f"message {number} (assistant) has a {filled_keys[0]} and a {filled_keys[1]} that say different things"
        )
    text = content_text(content)
    if filled_keys and text.lstrip().startswith("<think>") and inline_reasoning(text):
        raise RowError(f"message {number} (assistant) has reasoning in its content and as {filled_keys[0]}")


def content_text(content: Any) -> str:
    """Return the content of a message as one text, empty if there is none."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if "text" in part)
    return content or ""


def content_start(content: Any) -> str:
    """Return the text at the beginning of a content: of several parts, the first one's; empty if that is no text."""
    return content[0].get("text", "") if isinstance(content, list) and content else content_text(content)


def with_start(content: Any, text: str) -> Content:
    """Return `content` with `text` in place of its `content_start`."""
    return [{**content[0], "text": text}, *content[1:]] if isinstance(content, list) and content else text


def joined(message: Mapping[str, Any]) -> Message:
    """Return `message` with its content as one text."""
    content = message.get("content")
    return {**message, "content": content_text(content)} if isinstance(content, list) else dict(message)


def is_call(message: Any) -> bool:
    """Return whether a message of a file is itself a call, by its role."""
    return isinstance(message, dict) and (message.get("role") or message.get("from")) in NAMES_OF_CALLS


def _text(number: int, role: str, content: Any) -> str:
    if not isinstance(content, str):
        raise RowError(f"message {number} ({role}): content must be text, it is {format_value(content)}")
    return content


def _from_parts(number: int, role: str, parts: list[Any], message: Message) -> Content | None:
    """Return the text of a content that is given in parts, or its parts if several hold text; reasoning and calls among them
    become fields of `message`."""
    parts_by_kind: dict[str, list[Any]] = {kind: [] for kind in ORDER}
    last = 0
    for part in parts:
        kind = type_of_part(part)
        value = part.get(kind, part.get("value", part.get("text"))) if isinstance(part, dict) else part
        if of_media := media.PARTS.get(kind):
            parts_by_kind["text"].append(_image(number, role, part, of_media))
            last = max(last, ORDER.index("text"))
            continue
        holds = PARTS.get(kind, "")
        if not isinstance(part, str | dict) or (holds != "call" and not (holds and isinstance(value, str))):
            raise RowError(f"message {number} ({role}) has a part of type {kind!r:.60}; only text is trained on")
        if holds != "text" and role != "assistant":
            raise RowError(f"message {number} ({role}) has a part of type {kind!r}, which only the assistant has")
        if ORDER.index(holds) < last:
            reason = "templates write reasoning, then text, then calls, and its parts come in another order"
            raise RowError(f"message {number} ({role}): {reason}")
        last = ORDER.index(holds)
        parts_by_kind[holds].append(value)
    if parts_by_kind["reasoning"]:
        if filled_keys := [key for key in REASONING_KEYS if key in message]:
            raise RowError(f"message {number} ({role}) has reasoning in its content and as {filled_keys[0]}")
        message["reasoning_content"] = "".join(parts_by_kind["reasoning"])
    if parts_by_kind["call"]:
        if message.get("tool_calls"):
            raise RowError(f"message {number} ({role}) has calls in its content and as tool_calls")
        complaint = f"message {number}: a part of type 'tool_call' is not JSON"
        calls = parts_by_kind["call"]
        message["tool_calls"] = [from_json(call, complaint) if isinstance(call, str) else call for call in calls]
    if len(parts_by_kind["text"]) > 1 or any(isinstance(text, dict) for text in parts_by_kind["text"]):
        # The template decides how they are joined.
        return [text if isinstance(text, dict) else {"type": "text", "text": text} for text in parts_by_kind["text"]]
    return None if parts_by_kind["call"] and not parts_by_kind["text"] else "".join(parts_by_kind["text"])


def _image(number: int, role: str, part: Any, of_media: str) -> dict[str, Any]:
    """Return the part of an image (`images.places`). Raises RowError for audio and video, and where the assistant has it."""
    if of_media != "an image":
        raise RowError(f"message {number} ({role}) holds {of_media}; {media.UNREAD}")
    if role not in SPEAKERS:
        raise RowError(f"message {number} ({role}) holds an image; models see images and write none")
    return part_of_image(part, f"message {number} ({role})")


def type_of_part(part: Any) -> str:
    """Return the type of a part of a content; without the key `type`, its other keys show it."""
    if isinstance(part, str):
        return "text"
    if not isinstance(part, dict):
        return type(part).__name__
    kind = part.get("type") or next((key for key in part if key in PARTS or key in media.PARTS), "text")
    return str(kind)


def _weight(number: int, role: str, message: Message) -> int:
    weight_by_key = {key: message.pop(key) for key in WEIGHT_KEYS if key in message}
    if not weight_by_key:
        return 1
    for weight in weight_by_key.values():
        if not isinstance(weight, (bool, int, float)) or weight not in (0, 1):
            raise RowError(f"message {number} ({role}): weight must be 0 or 1, it is {format_value(weight)}")
    if len({int(weight) for weight in weight_by_key.values()}) > 1:
        raise RowError(f"message {number} ({role}) has different weights: {', '.join(weight_by_key)}")
    if role != "assistant":
        for key in WEIGHT_KEYS[1:]:
            if weight_by_key.get(key):
                reason = (
                    "only what the assistant says is trained; task.train_on_prompt=true trains the whole conversation"
                )
                raise RowError(f"message {number} ({role}) has {key}: 1; {reason}")
        return 1  # other roles are never trained, so a weight of 0 changes nothing
    return int(next(iter(weight_by_key.values())))


def _calls(number: int, name: str, role: str, message: Message, content: Any) -> list[dict[str, Any]]:
    """Return the tool calls of a message, each `{type: function, function: {name, arguments}}` with arguments as an object."""
    complaint = f"message {number}: tool_calls are not JSON"
    if name in NAMES_OF_CALLS:  # ShareGPT: a turn that is the call, as JSON text
        value = from_json(content, f"message {number} ({name}) is not JSON") if isinstance(content, str) else content
        calls = value if isinstance(value, list) else [value]
    elif "function_call" in message:  # OpenAI before tools
        if message.get("tool_calls"):
            raise RowError(f"message {number} ({role}) has tool_calls and function_call; give its calls as tool_calls")
        calls = [message["function_call"]]
    else:
        calls = message.get("tool_calls", [])
        if isinstance(calls, str):
            calls = from_json(calls, complaint)
    if not calls:
        return []
    if role != "assistant":
        raise RowError(f"message {number} ({role}) calls a tool, which only the assistant does")
    if not isinstance(calls, list):
        raise RowError(f"message {number}: tool_calls must be a list, it is {format_value(calls)}")
    return [_call(number, from_json(call, complaint) if isinstance(call, str) else call) for call in calls]


def _call(number: int, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"message {number}: a tool call needs the name of a function, it is {format_value(call)}")
    key = "arguments" if "arguments" in function else "parameters"
    arguments = function.get(key, {})
    if isinstance(arguments, str):
        # OpenAI writes them as text; templates of transformers print an object, and text would be quoted twice.
        arguments = from_json(arguments or "{}", f"message {number}: arguments of {function['name']} are not JSON")
    if not isinstance(arguments, dict):
        raise RowError(
            f"message {number}: arguments of {function['name']} must be an object, it is {format_value(arguments)}"
        )
    # A template may print a call as a whole, so all keys stay, in their order.
    inner = {"arguments" if name == key else name: value for name, value in function.items()}
    outer = call
    if function is call:
        outer = {name: inner.pop(name) for name in BESIDE_FUNCTION if name in inner}
    start = {} if "type" in outer else {"type": "function"}
    return {**start, **outer, "function": {**inner, "arguments": arguments}}


def from_json(text: str, complaint: str) -> Any:
    """Return the value of the JSON text, its objects marked as written. Raises RowError, whose reason begins with `complaint`."""
    try:
        return as_written(parse_json(text))
    except json.JSONDecodeError as error:
        of_python = "; Python's str() wrote it, json.dumps writes JSON" if _PYTHON.match(text) else ""
        reason = f"{error.msg.removesuffix(' at')} at character {error.pos + 1}{of_python}"
        raise RowError(f"{complaint}: {reason}") from None
    except ValueError as error:
        raise RowError(f"{complaint}: {error}") from None


def inline_reasoning(content: str) -> tuple[str, str] | None:
    """Return the reasoning at the beginning of a content, and the answer after it; None without reasoning.

    The opening `<think>` may be missing, since prompts may end with it. Tags after other text belong to the answer.
    """
    text_before, end_tag, answer = content.partition("</think>")
    reasoning = text_before.lstrip().removeprefix("<think>")
    return None if not end_tag or "<think>" in reasoning else (reasoning, answer)


class WrittenObject(dict[str, Any]):
    """An object from JSON text, in which somebody wrote every null; a table fills missing keys of its objects with null."""


def as_written(value: Any) -> Any:
    """Return a value of JSON text with each object that has a null as a `WrittenObject`."""
    if isinstance(value, dict):
        items = {key: as_written(item) for key, item in value.items()}
        return WrittenObject(items) if None in items.values() else items
    return [as_written(item) for item in value] if isinstance(value, list) else value


GIVEN = ("arguments", "parameters")
"""Keys of a call with its function's arguments, in which null is a value like any other."""


def without_none(value: Any, but: Collection[str] = ()) -> Any:
    """Return `value` without the keys whose value is None. but: keys below which None is kept."""
    if isinstance(value, dict):
        filled = {key: item for key, item in value.items() if item is not None}
        return {key: item if key in but else without_none(item, but) for key, item in filled.items()}
    if isinstance(value, list):
        return [without_none(item, but) for item in value]
    return value
