"""The texts in requests and answers, and the same with other texts in their place."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dstune.serve.errors import ApiError
from dstune.serve.guard.check import Text

Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Placed:
    """A text and where it stands in a body."""

    place: Place
    text: Text


def of_request(route: str, body: Mapping[str, Any]) -> list[Placed]:
    """Raises ApiError where a request holds what cannot be read here."""
    return list(_OF_ROUTE[route](body))


def put(body: Any, changes: Mapping[Place, str]) -> Any:
    """`body` with other texts."""
    if not changes:
        return body
    changed = copy.deepcopy(body)
    for place, text in changes.items():
        *way, last = place
        target = changed
        for key in way:
            target = target[key]
        target[last] = text
    return changed


def of_message(message: Mapping[str, Any], number: int, place: Place = ()) -> Iterator[Placed]:
    """All texts of a message, a tool call's arguments among them."""
    role = str(message.get("role", "user"))
    yield from _content(message.get("content"), role, number, (*place, "content"))
    for name in ("name", "refusal", "reasoning_content", "reasoning"):
        if isinstance(message.get(name), str):
            yield Placed((*place, name), Text(message[name], role, number))
    calls = message.get("tool_calls")
    for index, call in enumerate(calls if isinstance(calls, list) else ()):
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            where = (*place, "tool_calls", index, "function", "arguments")
            yield Placed(where, Text(function["arguments"], role, number))


def _content(value: Any, role: str, number: int, place: Place) -> Iterator[Placed]:
    if isinstance(value, str):
        yield Placed(place, Text(value, role, number))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            for key in ("text", "refusal", "input_text", "output_text"):
                if isinstance(part, dict) and isinstance(part.get(key), str):
                    yield Placed((*place, index, key), Text(part[key], role, number))
            if isinstance(part, str):
                yield Placed((*place, index), Text(part, role, number))


def _chat(body: Mapping[str, Any]) -> Iterator[Placed]:
    for number, message in enumerate(body["messages"]):
        yield from of_message(message, number, ("messages", number))


def _completion(body: Mapping[str, Any]) -> Iterator[Placed]:
    prompt = body["prompt"]
    if not isinstance(prompt, str) and not all(isinstance(one, str) for one in prompt):
        raise ApiError(400, "Token ids cannot be checked: send text.", param="prompt", code="not_checkable")
    yield from _texts(prompt, "prompt")
    yield from _texts(body.get("suffix") or [], "suffix")


def _responses(body: Mapping[str, Any]) -> Iterator[Placed]:
    if body.get("instructions"):
        yield Placed(("instructions",), Text(body["instructions"], "system"))
    if isinstance(body["input"], str):
        yield from _texts(body["input"], "input")
        return
    for number, item in enumerate(body["input"]):
        yield from of_message(item, number, ("input", number))


def _texts(value: Any, name: str, role: str = "user") -> Iterator[Placed]:
    if isinstance(value, str):
        yield Placed((name,), Text(value, role))
    else:
        for number, one in enumerate(value):
            yield Placed((name, number), Text(one, role, number))


def _inputs(body: Mapping[str, Any]) -> Iterator[Placed]:
    for name in ("input", "query", "text_1", "text_2"):
        if name in body:
            yield from _texts(body[name], name)
    for name in ("documents", "texts"):
        if name in body:
            yield from _texts(body[name], name, "tool")


def _words(body: Mapping[str, Any]) -> Iterator[Placed]:
    rows = body["input"]
    if isinstance(rows, list):
        rows = [row if isinstance(row, str) else " ".join(row) for row in rows]
    yield from _texts(rows, "input")


def _answers(body: Mapping[str, Any]) -> Iterator[Placed]:
    yield from _texts(body["question"], "question")
    yield from _texts(body["context"], "context", "tool")


def _rewards(body: Mapping[str, Any]) -> Iterator[Placed]:
    messages = body["messages"]
    if not isinstance(messages[0], list):
        yield from _chat(body)
        return
    for row, conversation in enumerate(messages):
        for number, message in enumerate(conversation):
            yield from of_message(message, number, ("messages", row, number))


_OF_ROUTE = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/responses": _responses,
    "/tags": _words,
    "/answers": _answers,
    "/rewards": _rewards,
    **dict.fromkeys(("/v1/embeddings", "/v1/moderations", "/classify", "/rerank", "/score"), _inputs),
}
ANSWERED_IN_TEXT = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


# -- answers ----------------------------------------------------------------------------------------------------------


def of_answer(answer: Mapping[str, Any]) -> dict[int, list[Placed]]:
    """The texts of each choice (of `/v1/responses`: of each item of the output)."""
    found: dict[int, list[Placed]] = {}
    for number, choice in enumerate(answer.get("choices") or []):
        if isinstance(choice.get("text"), str):
            found[number] = [Placed(("choices", number, "text"), Text(choice["text"], "assistant", number))]
        elif isinstance(choice.get("message"), dict):
            message = {**choice["message"], "role": "assistant"}
            found[number] = list(of_message(message, number, ("choices", number, "message")))
    for number, item in enumerate(answer.get("output") or []):
        where: Place = ("output", number)
        found[number] = list(_content(item.get("content"), "assistant", number, (*where, "content")))
        found[number] += list(_content(item.get("summary"), "assistant", number, (*where, "summary")))
        if isinstance(item.get("arguments"), str):
            found[number].append(Placed((*where, "arguments"), Text(item["arguments"], "assistant", number)))
    return found


TELLING = ("logprobs", "token_ids", "prompt_token_ids", "prompt_logprobs", "stop_reason")
"""What tells the text beside the text."""


def withheld(answer: dict[str, Any], number: int) -> dict[str, Any]:
    """An answer without one of its choices' text."""
    changed = copy.deepcopy(answer)
    if changed.get("choices"):
        choice = changed["choices"][number]
        for name in TELLING:
            choice.pop(name, None)
        choice["finish_reason"] = "content_filter"
        if "text" in choice:
            choice["text"] = ""
        if isinstance(choice.get("message"), dict):
            choice["message"] = {"role": "assistant", "content": ""}
    else:
        changed["output"] = []
        changed["output_text"] = ""
        changed["status"], changed["incomplete_details"] = "incomplete", {"reason": "content_filter"}
    return changed


def without_telling(answer: dict[str, Any], number: int) -> dict[str, Any]:
    """An answer of which a choice was masked: what tells its text otherwise is gone."""
    changed = copy.deepcopy(answer)
    if changed.get("choices"):
        for name in TELLING:
            changed["choices"][number].pop(name, None)
    changed.pop("prompt_logprobs", None)
    changed.pop("output_text", None)
    return changed
