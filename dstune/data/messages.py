"""Conversations as users have them (OpenAI, ShareGPT, Alpaca, prompt and completion) brought to one shape.

A message of that shape is what chat templates read: `role` (system, user, assistant, tool), `content` as text, and for
an assistant that calls tools `tool_calls` with arguments as an object. `weight: 0` marks an assistant's message that
is not trained; `render.py` keeps it out of the loss.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dstune.core.parsing import parse_json
from dstune.data.problems import RowError, format_value

Message = dict[str, Any]

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
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""The role that a name in a file stands for. `developer` is OpenAI's newer name of `system`, which most templates lack."""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names that data and templates have for what a model thinks before it answers."""

FOLLOWERS = {
    "start": ("system", "user", "assistant"),
    "system": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
"""Which role may follow which."""


def conversation_of(value: Any, column: str) -> list[Message]:
    """The messages of a list of `{role, content}` (OpenAI) or `{from, value}` (ShareGPT). Raises RowError."""
    if isinstance(value, str):  # CSV and many Parquet files hold the conversation as JSON text
        value = _json(value, f"column {column!r} is text but not JSON")
    if not isinstance(value, list) or not value:
        raise RowError(f"column {column!r} must be a list of messages that is not empty")
    return [_message(number, message) for number, message in enumerate(value, start=1)]


def exchange(prompt: str, answer: str) -> list[Message]:
    """A question and its answer."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def alpaca(fields: Mapping[str, Any]) -> list[Message]:
    """The messages of an Alpaca row (Taori et al. 2023): `instruction` with `input` on the line below, `output`,
    and optionally `system` and `history` (pairs of question and answer). Raises RowError."""
    question = fields["instruction"]
    if given := text_or_nothing(fields.get("input"), "input"):
        question = f"{question}\n{given}"
    messages = []
    history = fields.get("history") or []
    if isinstance(history, str):
        history = _json(history, "column 'history' is text but not JSON")
    if not isinstance(history, list):
        raise RowError(f"column 'history' must be a list, it is {format_value(history)}")
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) and text for text in pair):
            raise RowError(f"history {number} must be a question and an answer, it is {format_value(pair)}")
        messages += exchange(*pair)
    return [*messages, *exchange(question, fields["output"])]


def prompt_and_completion(prompt: Any, completion: Any) -> list[Message]:
    """The messages of a prompt and a completion of which one at least is a list of messages. Only those of the
    completion are trained. Raises RowError."""
    requested = exchange(prompt, "")[:1] if isinstance(prompt, str) else conversation_of(prompt, "prompt")
    answered = (
        exchange("", completion)[1:] if isinstance(completion, str) else conversation_of(completion, "completion")
    )
    kept = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in requested]
    return [*kept, *answered]


def with_system(messages: list[Message], system: Any) -> list[Message]:
    """`messages` under the text of a `system` column, if there is any. Raises RowError."""
    text = text_or_nothing(system, "system")
    if not text:
        return messages
    if messages[0]["role"] == "system":
        raise RowError("a system text stands in the column 'system' and in the first message")
    return [{"role": "system", "content": text}, *messages]


def text_or_nothing(value: Any, column: str) -> str:
    """The text of a column that may be absent or empty. Raises RowError for anything else."""
    if value is not None and not isinstance(value, str):
        raise RowError(f"column {column!r} must be text, it is {type(value).__name__}")
    return (value or "").strip()


def tools_of(value: Any) -> list[dict[str, Any]]:
    """JSON schemas of the tools that a conversation may call. Raises RowError."""
    if isinstance(value, str):
        value = _json(value, "tools are not JSON")
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("tools must be a list of JSON schemas")
    return [without_none(tool) for tool in value]


def conversation_row(
    messages: list[Message], fields: Mapping[str, Any], *, needs_answer: bool, silence: bool = False
) -> dict[str, Any]:
    """A chat row of these messages, with the tools that the row gives. silence: an answer that says nothing may be learned
    from. Raises RowError."""
    tools = tools_of(fields["tools"]) if fields.get("tools") else []
    parallel = fields.get("parallel_tool_calls")
    if parallel is not None and not isinstance(parallel, bool):
        raise RowError(f"parallel_tool_calls must be true or false, it is {format_value(parallel)}")
    check_conversation(messages, needs_answer=needs_answer, parallel_tool_calls=parallel)
    if needs_answer and not silence:
        check_answers(messages)
    row: dict[str, Any] = {"messages": messages}
    if tools:
        row["tools"] = tools
    if arguments := _template_arguments(fields.get("chat_template_kwargs")):
        row["chat_template_kwargs"] = arguments
    return row


def _template_arguments(value: Any) -> dict[str, Any]:
    """The arguments that a row gives to the chat template. Raises RowError."""
    if isinstance(value, str):
        value = _json(value, "chat_template_kwargs is text but not JSON")
    if value is not None and not isinstance(value, dict):
        raise RowError(f"chat_template_kwargs must be an object, it is {format_value(value)}")
    arguments: dict[str, Any] = without_none(value or {})
    return arguments


def plain_exchange(fields: Mapping[str, Any], *, needs_answer: bool, silence: bool = False) -> dict[str, Any]:
    """A chat row of a prompt and its completion: as they are where both are texts and nothing stands beside them, else as
    messages. Raises RowError."""
    prompt, completion = fields["prompt"], fields["completion"]
    tools = tools_of(fields["tools"]) if fields.get("tools") else []
    plain = isinstance(prompt, str) and isinstance(completion, str)
    bare = not tools and not fields.get("chat_template_kwargs")
    if plain and bare and not text_or_nothing(fields.get("system"), "system"):
        return {"prompt": prompt, "completion": completion}
    messages = with_system(prompt_and_completion(prompt, completion), fields.get("system"))
    return conversation_row(messages, fields, needs_answer=needs_answer, silence=silence)


def check_conversation(messages: list[Message], *, needs_answer: bool, parallel_tool_calls: Any = None) -> None:
    """Raises RowError for roles in an impossible order, several calls at once where those are ruled out, or (with
    `needs_answer`) no message to train on."""
    previous = "start"
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in FOLLOWERS[previous]:
            after = "at the start" if previous == "start" else f"after {previous}"
            raise RowError(
                f"message {number} has the role {role} {after}, where {' or '.join(FOLLOWERS[previous])} is expected"
            )
        calls = len(message.get("tool_calls", ()))
        if parallel_tool_calls is False and calls > 1:
            raise RowError(f"message {number} calls {calls} tools, and parallel_tool_calls is false")
        previous = role
    if not needs_answer:
        return
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise RowError("no trainable token: the conversation has no assistant message")
    if not any(message.get("weight", 1) for message in answers):
        raise RowError("no trainable token: every assistant message has the weight 0")


def check_answers(messages: list[Message]) -> None:
    """Raises RowError for a message to train on that would teach the model to say nothing."""
    if not any(_says_something(message) for message in messages):
        return  # cleaning leaves it out as empty
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant" and message.get("weight", 1) and not _says_something(message):
            raise RowError(f"message {number} (assistant) is empty; weight: 0 keeps it in the conversation, untrained")


def _says_something(message: Message) -> bool:
    return any(
        value.strip() if isinstance(value, str) else value
        for key, value in message.items()
        if key not in ("role", "weight", "name")
    )


def _message(number: int, message: Any) -> Message:
    if not isinstance(message, dict):
        raise RowError(f"message {number} must be an object with role and content")
    message = without_none(message)
    name = message.pop("role", None) or message.pop("from", None)
    role = ROLE_NAMES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowError(f"message {number} has the unknown role {name!r}; roles are {', '.join(ROLES)}")
    content = message.pop("content", message.pop("value", None))
    weight = _weight(number, role, message.pop("weight", 1))
    calls = _calls(number, name, role, message, content)
    result: Message = {"role": role}
    if content is None:
        content = message.pop("refusal", None)
    if name != "function_call" and not (calls and content is None):
        result["content"] = _content(number, role, content)
    for key in REASONING_KEYS if role == "assistant" else ():
        if not isinstance(message.get(key, ""), str):
            raise RowError(f"message {number} ({role}): {key} must be text, it is {format_value(message[key])}")
    for key in ("loss", "loss_weight", "train"):
        if key in message:
            # Other tools' names for weight: passed over, the row would be trained as if it were not there.
            raise RowError(f"message {number} has the key {key!r}; what is not to be trained is marked with weight: 0")
    result |= {key: value for key, value in message.items() if key not in ("tool_calls", "function_call")}
    if calls:
        result["tool_calls"] = calls
    if not weight:
        result["weight"] = 0
    return result


def _content(number: int, role: str, content: Any) -> str:
    """Text, also where it is given in parts."""
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            text = part if isinstance(part, str) else part.get(kind) if isinstance(part, dict) else None
            if kind not in ("text", "refusal") or not isinstance(text, str):
                raise RowError(f"message {number} ({role}) has a part of type {kind!r}; only text is trained on")
            texts.append(text)
        return "".join(texts)
    if not isinstance(content, str):
        raise RowError(f"message {number} ({role}): content must be text, it is {format_value(content)}")
    return content


def _weight(number: int, role: str, weight: Any) -> int:
    if not isinstance(weight, (bool, int, float)) or weight not in (0, 1):
        raise RowError(f"message {number} ({role}): weight must be 0 or 1, it is {format_value(weight)}")
    if not weight and role != "assistant":
        return 1  # what others say is never trained, so 0 is true of it
    return int(weight)


def _calls(number: int, name: str, role: str, message: Message, content: Any) -> list[dict[str, Any]]:
    """The tool calls of a message, each `{type: function, function: {name, arguments}}` with arguments as an object."""
    if name == "function_call":  # ShareGPT: a turn that is the call, as JSON text
        value = _json(content, f"message {number} (function_call) is not JSON") if isinstance(content, str) else content
        given = value if isinstance(value, list) else [value]
    elif "function_call" in message:  # OpenAI before tools
        if message.get("tool_calls"):
            raise RowError(f"message {number} ({role}) has tool_calls and function_call; give its calls as tool_calls")
        given = [message["function_call"]]
    else:
        given = message.get("tool_calls", [])
        if isinstance(given, str):
            given = _json(given, f"message {number}: tool_calls are not JSON")
    if not given:
        return []
    if role != "assistant":
        raise RowError(f"message {number} ({role}) calls a tool, which only the assistant does")
    if not isinstance(given, list):
        raise RowError(f"message {number}: tool_calls must be a list, it is {format_value(given)}")
    return [_call(number, call) for call in given]


def _call(number: int, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"message {number}: a tool call needs the name of a function, it is {format_value(call)}")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        # OpenAI writes them as text; templates of transformers print an object, and text would be quoted twice.
        arguments = _json(arguments or "{}", f"message {number}: arguments of {function['name']} are not JSON")
    if not isinstance(arguments, dict):
        raise RowError(
            f"message {number}: arguments of {function['name']} must be an object, it is {format_value(arguments)}"
        )
    outer = {} if "function" not in call else {key: value for key, value in call.items() if key != "function"}
    return {"type": "function", **outer, "function": {"name": function["name"], "arguments": arguments}}


def _json(text: str, complaint: str) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise RowError(f"{complaint}: {error.msg.removesuffix(' at')} at character {error.pos + 1}") from None
    except ValueError as error:
        raise RowError(f"{complaint}: {error}") from None


def without_none(value: Any) -> Any:
    """`value` without the keys whose value is None: Parquet gives every object the keys of all of them."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value
