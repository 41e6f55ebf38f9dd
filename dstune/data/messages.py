"""Normalise conversations in users' forms (OpenAI, ShareGPT, Alpaca, prompt and completion) to a list of messages.

`message.py` defines the form of a message. `weight: 0` marks an assistant's message that is not trained; `render.py` keeps it
out of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstune.data.content_blocks import with_parameters, without_blocks
from dstune.data.message import (
    REASONING_KEYS,
    Message,
    WrittenObject,
    content_text,
    from_json,
    is_call,
    message_of,
    without_none,
)
from dstune.data.problems import RowError, format_value

EXCHANGE_KEYS = ("system", "human", "user", "assistant")
"""Keys of an object that holds a question and its answer, in the order of the messages."""

USUAL_FOLLOWERS = {
    "start": ("system", "user", "assistant"),
    "system": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
"""The roles that may follow each role in a conversation that every chat template renders."""

FOLLOWERS = {
    "start": ("system", "user", "assistant"),
    "system": ("system", "user", "assistant"),
    "user": ("system", "user", "assistant"),
    "assistant": ("system", "user", "assistant", "tool"),
    "tool": ("system", "user", "assistant", "tool"),
}
"""The roles that may follow each role at all; `render.py` checks whether the model's template renders the conversation."""

VALUES = ("default", "const", "example")
"""Keywords of JSON Schema whose value may be anything, null included."""

NAMES = ("properties", "patternProperties", "$defs", "definitions")
"""Keywords of JSON Schema whose keys are names."""

NO_ARGUMENTS = frozenset(
    {
        "messages",
        "tools",
        "add_generation_prompt",
        "chat_template",
        "tokenize",
        "continue_final_message",
        "conversation",
    }
    | {"padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"}
)
"""Arguments of transformers' rendering that are not the template's own."""

BESIDE_CONVERSATION = "the column {!r} stands beside a prompt that is a conversation, which has no place for it"


def conversation_of(value: Any, column: str) -> list[Message]:
    """Return the messages of a list of `{role, content}` (OpenAI), `{from, value}` (ShareGPT) or `{human, assistant}` (a question
    and its answer in one object). Raises RowError."""
    if isinstance(value, str):  # CSV and many Parquet files hold the conversation as JSON text
        value = from_json(value, f"column {column!r} is text but not JSON")
    if isinstance(value, dict) and all(isinstance(items, list) for items in value.values()):
        value = _from_lists(value, column)
    if not isinstance(value, list) or not value:
        raise RowError(f"column {column!r} must be a list of messages that is not empty")
    messages: list[Message] = []
    separate = (message for item in value for exchanged in _of_exchange(item) for message in without_blocks(exchanged))
    for number, raw_message in enumerate(separate, start=1):
        message = message_of(number, raw_message)
        if is_call(raw_message) and messages and messages[-1]["role"] == "assistant":
            messages[-1] = _with_calls(messages[-1], message, number)
        else:
            messages.append(message)
    return messages


def is_list_of_messages(value: Any) -> bool:
    """Return whether a value is a list of objects that each say who speaks."""
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in value)


def _from_lists(columns: dict[str, list[Any]], column: str) -> list[dict[str, Any]]:
    """Return the messages of an object of lists: the form in which `Sequence` of `datasets` stores a list of objects. Raises
    RowError."""
    if len({len(items) for items in columns.values()}) > 1:
        raise RowError(f"column {column!r} has lists of different lengths: {', '.join(columns)}")
    return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]


def _with_calls(message: Message, call: Message, number: int) -> Message:
    """Return the assistant's `message` with the `call` that follows it (ms-swift) and belongs to the same turn. Raises RowError."""
    for key in ("weight", *REASONING_KEYS):
        if call.get(key) != message.get(key) and (key in call or key == "weight"):
            raise RowError(f"message {number} calls a tool in the turn of the message before it, and has another {key}")
    return {**message, "tool_calls": [*message.get("tool_calls", ()), *call.get("tool_calls", ())]}


def _of_exchange(item: Any) -> list[Any]:
    """Return the messages of `{human, assistant}`; anything else as it is."""
    if not isinstance(item, dict) or "role" in item or "from" in item:
        return [item]
    exchange = without_none(item)
    if not exchange or not exchange.keys() <= set(EXCHANGE_KEYS):
        return [item]
    return [{"role": name, "content": exchange[name]} for name in EXCHANGE_KEYS if name in exchange]


def exchange(prompt: str, answer: str) -> list[Message]:
    """Return a question and its answer."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def alpaca(fields: Mapping[str, Any], *, input_apart: bool = False) -> list[Message]:
    """Return the messages of an Alpaca row (Taori et al. 2023): `instruction` with `input` on the line below, `output`, and
    optionally `history`. input_apart: the input is a key of the question's message instead. Raises RowError."""
    input_text = text_or_nothing(fields.get("input"), "input") if input_apart else ""
    question = fields["instruction"] if input_text else with_input(fields["instruction"], fields.get("input"))
    question_message, answer_message = exchange(question, fields["output"])
    return [
        *history_of(fields.get("history")),
        {**question_message, "input": input_text} if input_text else question_message,
        answer_message,
    ]


def with_input(question: Any, value: Any) -> Any:
    """Return a question followed by the text of the column `input`, if there is any, on a new line. Raises RowError."""
    input_text = text_or_nothing(value, "input")
    if not input_text:
        return question
    if not isinstance(question, str):
        raise RowError(BESIDE_CONVERSATION.format("input"))
    return f"{question}\n{input_text}"


def history_of(value: Any) -> list[Message]:
    """Return the messages of the column `history`: pairs of a question and its answer. Raises RowError."""
    if isinstance(value, str) and value.strip():
        value = from_json(value, "column 'history' is text but not JSON")
    if not isinstance(value or [], list):
        raise RowError(f"column 'history' must be a list, it is {format_value(value)}")
    messages: list[Message] = []
    for number, pair in enumerate(value or [], start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) and text for text in pair):
            raise RowError(f"history {number} must be a question and an answer, it is {format_value(pair)}")
        messages += exchange(*pair)
    return messages


def after_history(prompt: Any, value: Any) -> Any:
    """Return the prompt, preceded by the exchanges of the column `history` if there are any. Raises RowError."""
    history = history_of(value)
    if not history:
        return prompt
    if not isinstance(prompt, str):
        raise RowError(BESIDE_CONVERSATION.format("history"))
    return [*history, *exchange(prompt, "")[:1]]


def prompt_and_completion(prompt: Any, completion: Any) -> list[Message]:
    """Return the messages of a prompt and a completion; either may be a text or a list of messages. Only those of the completion
    are trained. Raises RowError."""
    prompt_messages = exchange(prompt, "")[:1] if isinstance(prompt, str) else conversation_of(prompt, "prompt")
    answered = (
        exchange("", completion)[1:] if isinstance(completion, str) else conversation_of(completion, "completion")
    )
    refuse_continued(prompt_messages, answered)
    context = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in prompt_messages]
    return [*context, *answered]


def refuse_continued(prompt_messages: list[Message], answered: list[Message]) -> None:
    """Raise RowError if the answer continues the last message of the prompt instead of following it."""
    if prompt_messages[-1]["role"] == "assistant" and answered[0]["role"] == "assistant":
        raise RowError(
            "the prompt ends inside a message of the assistant, which a server is asked to continue by "
            "continue_final_message alone; give the prompt without it, and the message as a whole as the answer"
        )


def with_system(messages: list[Message], system: Any) -> list[Message]:
    """Return `messages`, preceded by the text of the column `system`, if there is any. Raises RowError."""
    text = text_or_nothing(system, "system")
    if not text:
        return messages
    if messages[0]["role"] == "system":
        if content_text(messages[0]["content"]).strip() == text.strip():
            return messages
        raise RowError("a system text stands in the column 'system' and in the first message")
    return [{"role": "system", "content": text}, *messages]


def text_or_nothing(value: Any, column: str) -> str:
    """Return the text of a column that may be absent or blank. Raises RowError for anything else."""
    if value is not None and not isinstance(value, str):
        raise RowError(f"column {column!r} must be text, it is {type(value).__name__}")
    return value if value and value.strip() else ""


def tools_of(value: Any) -> list[dict[str, Any]]:
    """Return the JSON schemas of the tools that a conversation may call, in the form that templates and servers read: `{type:
    function, function: {name, description, parameters}}`. A row may give only the inner object. Raises RowError."""
    is_text = isinstance(value, str)
    if is_text:
        value = from_json(value, "tools are not JSON")
    if value is None:
        return []
    if isinstance(value, list) and value and all(isinstance(tool, str) for tool in value):  # `Json` of an older pyarrow
        is_text, value = True, [from_json(tool, "tools are not JSON") for tool in value]
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("tools must be a list of JSON schemas")
    tools = value if is_text else _without_absent(value)
    for number, tool in enumerate(tools, 1):
        if not isinstance(function := tool.get("function", {}), dict):
            raise RowError(f"the function of tool {number} must be an object, it is {format_value(function)}")
    return [_tool(tool) for tool in tools]


def _without_absent(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return `tools` without meaningless nulls.

    A null default has a meaning, unless other keywords are null where JSON Schema does not allow it. Then the schemas were stored
    in a table, which gives every object the keys of all objects, and all nulls are removed.
    """
    tools_without_null = [_without_null_keywords(tool) for tool in tools]
    from_table = [_parameters(tool) for tool in tools_without_null] != [_parameters(tool) for tool in tools]
    return [without_none(tool) for tool in tools] if from_table else tools_without_null


def _without_null_keywords(schema: Any, *, names: bool = False) -> Any:
    """Return `schema` without keywords that are null where JSON Schema does not allow it. names: whether its keys are names of
    arguments."""
    if isinstance(schema, list):
        return [_without_null_keywords(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    values = () if names else VALUES
    return {
        key: item if key in values else _without_null_keywords(item, names=not names and key in NAMES)
        for key, item in schema.items()
        if item is not None or key in values
    }


def _parameters(tool: dict[str, Any]) -> Any:
    function = tool.get("function") or tool
    return function.get("parameters") if isinstance(function, dict) else None


def without_strange_nulls(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    """Return `messages` without null arguments of calls that their function does not have, if `tools` describes its arguments.

    Objects that were once stored in a table have the arguments of all calls. In JSON text, as OpenAI's API has them, somebody wrote
    the null: a server prints it, so it stays.
    """
    arguments_by_function: dict[str, Any] = {}
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(parameters := function.get("parameters"), dict) and isinstance(
            parameters.get("properties"), dict
        ):
            arguments_by_function[str(function.get("name"))] = parameters["properties"]
    if not arguments_by_function or not any(message.get("tool_calls") for message in messages):
        return messages

    def without_absent_arguments(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        argument_names = arguments_by_function.get(function["name"])
        if isinstance(function["arguments"], WrittenObject):
            return call
        if argument_names is None or None not in function["arguments"].values():
            return call
        arguments = {
            key: value for key, value in function["arguments"].items() if value is not None or key in argument_names
        }
        return {**call, "function": {**function, "arguments": arguments}}

    return [
        {**message, "tool_calls": [without_absent_arguments(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    tool = with_parameters(tool)
    is_bare = "function" not in tool and isinstance(tool.get("name"), str)
    if not is_bare or tool.get("type", "function") not in ("function", "custom"):
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def conversation_row(
    messages: list[Message], fields: Mapping[str, Any], *, needs_answer: bool, silence: bool = False
) -> dict[str, Any]:
    """Return the chat row of these messages, with the row's tools and template arguments. silence: whether an empty answer may be
    trained. Raises RowError."""
    tools = tools_of(fields["tools"]) if fields.get("tools") else []
    messages = without_strange_nulls(messages, tools)
    parallel = fields.get("parallel_tool_calls")
    if parallel is not None and not isinstance(parallel, bool):
        raise RowError(f"parallel_tool_calls must be true or false, it is {format_value(parallel)}")
    check_conversation(messages, needs_answer=needs_answer, parallel_tool_calls=parallel)
    if needs_answer and not silence:
        check_answers(messages)
    row: dict[str, Any] = {"messages": messages}
    if tools:
        row["tools"] = tools
    if arguments := template_arguments(fields.get("chat_template_kwargs")):
        row["chat_template_kwargs"] = arguments
    return row


def template_arguments(value: Any) -> dict[str, Any]:
    """Return the row's arguments for the chat template. Raises RowError."""
    if isinstance(value, str):
        value = from_json(value, "chat_template_kwargs is text but not JSON")
    if value is not None and not isinstance(value, dict):
        raise RowError(f"chat_template_kwargs must be an object, it is {format_value(value)}")
    arguments: dict[str, Any] = without_none(value or {})
    if strange := sorted(arguments.keys() & NO_ARGUMENTS):
        raise RowError(f"chat_template_kwargs has {strange[0]!r}, which is no argument of a template")
    return arguments


def plain_exchange(fields: Mapping[str, Any], *, needs_answer: bool, silence: bool = False) -> dict[str, Any]:
    """Return the chat row of a prompt and its completion: unchanged if both are texts and the row has no history, tools, system
    text or template arguments; otherwise as messages. Raises RowError."""
    prompt, completion = fields["prompt"], fields["completion"]
    earlier = history_of(fields.get("history"))
    tools = tools_of(fields["tools"]) if fields.get("tools") else []
    are_texts = isinstance(prompt, str) and isinstance(completion, str)
    is_bare = not tools and not earlier and not fields.get("chat_template_kwargs")
    if are_texts and is_bare and not text_or_nothing(fields.get("system"), "system"):
        return {"prompt": prompt, "completion": completion}
    if earlier and not isinstance(prompt, str):
        raise RowError(BESIDE_CONVERSATION.format("history"))
    messages = with_system([*earlier, *prompt_and_completion(prompt, completion)], fields.get("system"))
    return conversation_row(messages, fields, needs_answer=needs_answer, silence=silence)


def check_conversation(messages: list[Message], *, needs_answer: bool, parallel_tool_calls: Any = None) -> None:
    """Raise RowError for roles in an impossible order, several calls in a message that `parallel_tool_calls` forbids, or (with
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


def first_unusual(messages: list[Message]) -> int | None:
    """Return the index of the first message whose role does not usually follow the role before it; None if there is none."""
    previous = "start"
    for number, message in enumerate(messages):
        if message["role"] not in USUAL_FOLLOWERS[previous]:
            return number
        previous = message["role"]
    return None


def check_answers(messages: list[Message]) -> None:
    """Raise RowError for an empty message that would teach the model to say nothing."""
    if not any(_says_something(message) for message in messages):
        return  # cleaning removes such a row as empty
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant" and message.get("weight", 1) and not _says_something(message):
            raise RowError(f"message {number} (assistant) is empty; weight: 0 keeps it in the conversation, untrained")


def _says_something(message: Message) -> bool:
    texts = (content_text(message.get("content")), *(message.get(key) for key in REASONING_KEYS))
    return bool(message.get("tool_calls")) or any(text and text.strip() for text in texts)
