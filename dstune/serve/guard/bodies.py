"""The texts in requests and answers, and the same with other texts in their place."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dstune.serve.errors import ApiError
from dstune.serve.guard.check import MOST_TEXTS, Text

Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Placed:
    """A text and where it stands in a body."""

    place: Place
    text: Text


def of_request(route: str, body: Mapping[str, Any]) -> list[Placed]:
    """At most one more than are checked. Raises ApiError where a request holds what cannot be read here."""
    return list(islice(_OF_ROUTE[route](body), MOST_TEXTS + 1))


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


KINDS = frozenset({"role", "type", "status", "object", "finish_reason", "native_finish_reason"})
"""Keys whose text says what something is: there is nothing to read in it."""
IDS = frozenset({"id", "tool_call_id", "call_id"})
MEDIA = frozenset(
    {"image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file", "input_file"}
)
"""Types of parts that hold no text but what stands under `text`."""
_ID = re.compile(r"[\w.:-]{0,64}")


def of_message(message: Mapping[str, Any], number: int, place: Place = ()) -> Iterator[Placed]:
    """All texts of a message, wherever they stand in it: a template or a model elsewhere may print any of them."""
    role = str(message.get("role", "user"))
    for where, text in texts_in(message):
        yield Placed((*place, *where), Text(text, role, number))


def texts_in(value: Any, place: Place = (), but: Collection[str] = ()) -> Iterator[tuple[Place, str]]:
    """Each text of a JSON value and where it stands. but: keys that are left out."""
    if isinstance(value, str):
        key = place[-1] if place else ""
        if not (key in KINDS or (key in IDS and _ID.fullmatch(value))):
            yield place, value
    elif isinstance(value, dict):
        media = is_media(value)
        for key, item in value.items():
            if key not in but and (not media or key == "text"):
                yield from texts_in(item, (*place, key), but)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from texts_in(item, (*place, index), but)


def is_media(part: Mapping[str, Any]) -> bool:
    kind = part.get("type")
    return isinstance(kind, str) and kind in MEDIA


def _chat(body: Mapping[str, Any]) -> Iterator[Placed]:
    for number, message in enumerate(body["messages"]):
        yield from of_message(message, number, ("messages", number))
    for where, text in texts_in(body.get("chat_template_kwargs") or {}):  # the template prints them
        yield Placed(("chat_template_kwargs", *where), Text(text, "user", len(body["messages"]) - 1))


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
        found[number] = [
            Placed(("choices", number, *where), Text(text, "assistant", number))
            for where, text in texts_in(dict(choice), but=TELLING)
        ]
    for number, item in enumerate(answer.get("output") or []):
        found[number] = [
            Placed(("output", number, *where), Text(text, "assistant", number)) for where, text in texts_in(dict(item))
        ]
    return found


TELLING = ("logprobs", "token_ids", "prompt_token_ids", "prompt_logprobs", "stop_reason")
"""What tells the text beside the text."""


def withheld(answer: dict[str, Any], number: int) -> dict[str, Any]:
    """An answer without one of its choices' text."""
    changed = copy.deepcopy(answer)
    if changed.get("choices"):
        choice = changed["choices"][number]
        kind: dict[str, Any] = {"text": ""} if "text" in choice else {"message": {"role": "assistant", "content": ""}}
        changed["choices"][number] = {"index": number, **kind, "finish_reason": "content_filter"}
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
