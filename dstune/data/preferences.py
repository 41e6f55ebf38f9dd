"""Normalise rows that compare or judge answers: two answers to a prompt, or one answer with a verdict.

A pair holds `prompt`, `chosen` and `rejected`: texts, or lists of messages. If there is no prompt, or `chosen` and
`rejected` are complete conversations, their common messages at the start are the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dstune.data.images.places import COLUMN
from dstune.data.media import holds_something
from dstune.data.message import ROLE_NAMES, Message, content_text
from dstune.data.messages import (
    BESIDE_CONVERSATION,
    after_history,
    check_answers,
    check_conversation,
    conversation_of,
    exchange,
    refuse_continued,
    template_arguments,
    text_or_nothing,
    tools_of,
    with_input,
    with_system,
    without_strange_nulls,
)
from dstune.data.problems import RowError, format_value
from dstune.data.values import messages_in, number

Row = dict[str, Any]
ANSWERS = ("chosen", "rejected")

_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def pair_row(fields: Mapping[str, Any]) -> Row:
    """Return a normalised pair: `prompt`, `chosen` and `rejected`, all as texts or all as messages, with `tools`,
    `chat_template_kwargs` and `margin` if given.

    `input` and `history` belong to a prompt that is text, as in Alpaca rows. Raises RowError.
    """
    margin = None if fields.get("margin") in (None, "") else number(fields["margin"], "margin")
    tools = tools_of(fields["tools"]) if fields.get("tools") else []
    arguments = template_arguments(fields.get("chat_template_kwargs"))
    system = text_or_nothing(fields.get("system"), "system")
    prompt = _prompt(fields.get("prompt"))
    answers = {name: _answer(fields[name], name) for name in ANSWERS}
    if prompt is None and all(isinstance(answer, str) and is_dialogue(answer) for answer in answers.values()):
        answers = {name: dialogue_of(answer) for name, answer in answers.items()}
    if prompt is None and any(isinstance(answer, str) for answer in answers.values()):
        raise RowError("no column 'prompt', without which chosen and rejected must be whole conversations")
    if prompt is None:
        for column in ("input", "history"):
            if holds_something(fields.get(column)):
                raise RowError(BESIDE_CONVERSATION.format(column))
    else:
        prompt = after_history(with_input(prompt, fields.get("input")), fields.get("history"))
    row: Row
    if (
        isinstance(prompt, str)
        and all(isinstance(answer, str) for answer in answers.values())
        and not (tools or system or arguments)
    ):
        row = {"prompt": prompt, **answers}
    else:
        row = _conversations(prompt, answers, system)
        row = {name: without_strange_nulls(messages, tools) for name, messages in row.items()}
        if tools:
            row["tools"] = tools
        if arguments:
            row["chat_template_kwargs"] = arguments
    if row["chosen"] == row["rejected"]:
        raise RowError("chosen and rejected are the same")
    return row if margin is None else {**row, "margin": margin}


def is_dialogue(text: str) -> bool:
    """Return whether a text is a conversation in the form of hh-rlhf (Bai et al. 2022): `\\n\\nHuman: ...\\n\\nAssistant: ...`."""
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def dialogue_of(text: str) -> list[Message]:
    """Return the messages of a conversation in the form of hh-rlhf."""
    parts = _SPEAKER.split("\n\n" + text.lstrip())
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": ROLE_NAMES[speaker.lower()], "content": text.strip()} for speaker, text in turns]


def parted(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """Split a conversation into the messages before its last one, and the last one. Raises RowError if that is not the
    assistant's answer."""
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise RowError("the last message is judged, so it has to be the assistant's answer to an earlier message")
    return messages[:-1], messages[-1:]


def is_verdict(value: Any) -> bool:
    """Return whether `verdict_of` accepts the value."""
    if value is None:
        return False
    try:
        verdict_of(value, "label")
    except RowError:
        return False
    return True


def verdict_of(value: Any, column: str) -> bool:
    """Return the verdict (True: a good answer) that is given as true or false, 1 or 0, or these as text. Raises RowError."""
    if isinstance(value, str):
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower(), value)
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise RowError(f"column {column!r} must be true (a good answer) or false (a bad one), it is {format_value(value)}")


def as_chat(row: Row, answer: str) -> Row:
    """Return the chat row of a pair's prompt and one of its answers. answer: `chosen` or `rejected`. Messages of the assistant in
    the prompt are no targets."""
    options: Row = {key: row[key] for key in ("tools", "chat_template_kwargs", COLUMN) if key in row}
    if isinstance(row["prompt"], str):
        return {"prompt": row["prompt"], "completion": row[answer], **options}
    return {"messages": [*_untrained(row["prompt"]), *row[answer]], **options}


def _conversations(prompt: Any, answers: dict[str, Any], system: str) -> Row:
    """Return the pair with its prompt and answers as messages. Raises RowError."""
    answered = {
        name: exchange("", answer)[1:] if isinstance(answer, str) else answer for name, answer in answers.items()
    }
    are_whole = [messages[0]["role"] in ("system", "user") for messages in answered.values()]
    if all(are_whole):  # a prompt column then repeats their beginning
        common = _common(answered["chosen"], answered["rejected"])
        if answered["chosen"] == answered["rejected"]:
            raise RowError("chosen and rejected are the same")
        if not common:
            raise RowError("chosen and rejected begin with different messages, so they answer no common prompt")
        prompt_messages = answered["chosen"][:common]
        _refuse_another_prompt(prompt, prompt_messages, answered["chosen"])
        answered = {name: messages[common:] for name, messages in answered.items()}
    elif any(are_whole):
        raise RowError("one of chosen and rejected is a whole conversation, the other an answer")
    elif prompt is None:
        raise RowError("no column 'prompt', without which chosen and rejected must be whole conversations")
    else:
        prompt_messages = exchange(prompt, "")[:1] if isinstance(prompt, str) else prompt
    prompt_messages = with_system(prompt_messages, system)
    for name, messages in answered.items():
        if not messages:
            raise RowError(f"{name} ends where the other one goes on")
        if messages[0]["role"] != "assistant":
            raise RowError(
                f"chosen and rejected differ before the assistant answers: message {len(prompt_messages) + 1} of {name} has the "
                f"role {messages[0]['role']}"
            )
        refuse_continued(prompt_messages, messages)
        check_conversation([*_untrained(prompt_messages), *messages], needs_answer=True)
        if name == "chosen":  # a rejected answer may be empty: it teaches the model not to be silent
            check_answers([*_untrained(prompt_messages), *messages])
    return {"prompt": prompt_messages, **answered}


def _refuse_another_prompt(prompt: Any, common: list[Message], chosen: list[Message]) -> None:
    """Raise RowError if the column `prompt` next to complete conversations differs from them: it would be dropped silently.

    common: the messages that both conversations begin with.
    """
    if isinstance(prompt, list):
        is_same = prompt in (chosen[: len(prompt)], common)
    else:
        common_text = _words(" ".join(content_text(message.get("content")) for message in common))
        prompt_words = _words(prompt or "")
        is_same = prompt_words in common_text or all(
            _words(content_text(message.get("content"))) in prompt_words
            for message in common
            if message["role"] != "system"
        )
    if not is_same:
        raise RowError("the column 'prompt' says what chosen and rejected, which are whole conversations, do not")


def _words(text: str) -> str:
    return " ".join(text.split())


def _common(first: list[Message], second: list[Message]) -> int:
    """Return the number of messages that the two have in common at the start."""
    for count, (first_message, second_message) in enumerate(zip(first, second, strict=False)):
        if first_message != second_message:
            return count
    return min(len(first), len(second))


def _untrained(messages: list[Message]) -> list[Message]:
    """Return `messages` with weight 0 for those of the assistant."""
    return [{**message, "weight": 0} if message["role"] == "assistant" else message for message in messages]


def _prompt(value: Any) -> Any:
    value = messages_in(value, "prompt")
    if value is None or isinstance(value, str):
        if value is not None and not value.strip():
            raise RowError("column 'prompt' is empty")
        return value
    return conversation_of(value, "prompt")


def _answer(value: Any, column: str) -> Any:
    value = messages_in(value, column)
    if isinstance(value, str):
        if not value.strip():
            raise RowError(f"column {column!r} is empty")
        return value
    return conversation_of([value] if isinstance(value, dict) else value, column)
