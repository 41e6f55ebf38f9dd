"""Extracts the texts of requests and answers, and replaces them."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dstune.guard.check import MOST_TEXTS, Text
from dstune.serve.errors import ApiError

Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Placed:
    """A text and its place in a body."""

    place: Place
    text: Text


def of_request(route: str, body: Mapping[str, Any]) -> list[Placed]:
    """Return the texts of a request; if there are too many, one more than may be checked. Raises ApiError if the request contains
    something that cannot be read."""
    return list(islice(_OF_ROUTE[route](body), MOST_TEXTS + 1))


def put(body: Any, changes: Mapping[Place, str]) -> Any:
    """Return a copy of `body` with the texts at the places of `changes` replaced; `body` itself if there are none."""
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
"""Keys whose text is only a type or status, provided it is one word."""
IDS = frozenset({"id", "tool_call_id", "call_id"})
MEDIA = frozenset(
    {"image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file", "input_file"}
)
"""Types of content parts that hold something other than text."""
DATA = MEDIA | {"audio_url", "file_data", "file_url", "file_id", "source", "url", "data", "base64", "path"}
"""Keys under which such a part holds its data, possibly nested."""
_DESCRIBES = frozenset({"detail", "format", "media_type", "mime_type"})
"""Keys that describe a part's image or sound in a word."""
_WITHIN = frozenset({"message", "delta", "content", "output"})
"""Keys on the path to the parts of a content, or of a function's output."""
_KIND = re.compile(r"[\w.-]{0,32}")
_DESCRIPTION = re.compile(r"[\w./+-]{0,32}")
_ID = re.compile(r"[\w.:-]{0,64}")


def of_message(message: Mapping[str, Any], number: int, place: Place = ()) -> Iterator[Placed]:
    """Yield all texts of a message, wherever they are: a template or a remote model may print any of them."""
    role = str(message.get("role", "user"))
    for where, text in texts_in(message):
        yield Placed((*place, *where), Text(text, role, number))


def texts_in(value: Any, skipped_keys: Collection[str] = ()) -> Iterator[tuple[Place, str]]:
    """Yield each text of a JSON value with its place. but: keys to skip."""
    return ((where, text) for where, text, media in _texts_in(value, skipped_keys=skipped_keys) if not media)


def media_in(value: Any) -> set[str]:
    """Return the types of a message's parts of which some data is skipped."""
    return {media for _, _, media in _texts_in(value) if media}


def _texts_in(
    value: Any, place: Place = (), skipped_keys: Collection[str] = (), part: str = "", data: bool = True
) -> Iterator[tuple[Place, str, str]]:
    """Yield texts like `texts_in`, each with the type of the part whose data it is; empty for a text to check. part: the type of
    the enclosing media part. data: whether all keys from there on belong to its data."""
    if isinstance(value, str):
        key = place[-1] if place else ""
        if part and data and not _has_space(value):  # data contains no spaces, unlike prose
            yield place, value, part
        elif not _is_identifier(key, value, part):
            yield place, value, ""
    elif isinstance(value, dict):
        if media := _media(value, place):
            part, data = media, True
        for key, item in value.items():
            if key not in skipped_keys:
                yield from _texts_in(item, (*place, key), skipped_keys, part, data and key in DATA)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts_in(item, (*place, index), skipped_keys, part, data)


def _has_space(text: str) -> bool:
    # Five times as fast as a regular expression over the megabytes of an image.
    return text != "" and text.split(None, 1) != [text]


def _is_identifier(key: str | int, text: str, part: str) -> bool:
    """Return whether a text is only a type, an id or a description."""
    return (
        (key in KINDS and _KIND.fullmatch(text) is not None)
        or (key in IDS and _ID.fullmatch(text) is not None)
        or (part != "" and key in _DESCRIBES and _DESCRIPTION.fullmatch(text) is not None)
    )


def _media(value: Mapping[str, Any], place: Place) -> str:
    """Return the type of a content part without text. Empty for everything else, whatever type it claims: templates print the
    arguments of a call, and models read them."""
    kind = value.get("type")
    within = place != () and isinstance(place[-1], int) and all(isinstance(key, int) or key in _WITHIN for key in place)
    return kind if within and isinstance(kind, str) and kind in MEDIA else ""


def _chat(body: Mapping[str, Any]) -> Iterator[Placed]:
    for number, message in enumerate(body["messages"]):
        yield from of_message(message, number, ("messages", number))
    for where, text in texts_in(body.get("chat_template_kwargs") or {}):  # the template prints them
        yield Placed(("chat_template_kwargs", *where), Text(text, "user", len(body["messages"]) - 1))


def _completion(body: Mapping[str, Any]) -> Iterator[Placed]:
    prompt = body["prompt"]
    if not isinstance(prompt, str) and not all(isinstance(part, str) for part in prompt):
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
        yield from of_message({"role": _role_of(item), **item}, number, ("input", number))


def _role_of(item: Mapping[str, Any]) -> str:
    """Return the author of an item without a role: the tool for an output, the model for calls and reasoning."""
    kind = str(item.get("type", ""))
    if kind.endswith("_output"):
        return "tool"
    return "assistant" if kind.endswith("_call") or kind == "reasoning" else "user"


def _texts(value: Any, name: str, role: str = "user") -> Iterator[Placed]:
    if isinstance(value, str):
        yield Placed((name,), Text(value, role))
    else:
        for number, text in enumerate(value):
            yield Placed((name, number), Text(text, role, number))


def _inputs(body: Mapping[str, Any]) -> Iterator[Placed]:
    for name in ("input", "query", "text_1", "text_2"):
        if name in body:
            yield from _texts(body[name], name)
    for name in ("documents", "texts"):
        if name in body:
            yield from _texts(body[name], name, "tool")


def _tagged_texts(body: Mapping[str, Any]) -> Iterator[Placed]:
    """Yield the texts of a request to `/tags`; a list of words is joined into one text."""
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
    "/tags": _tagged_texts,
    "/answers": _answers,
    "/rewards": _rewards,
    **dict.fromkeys(("/v1/embeddings", "/v1/moderations", "/classify", "/rerank", "/score"), _inputs),
}
ANSWERED_IN_TEXT = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


# -- answers ----------------------------------------------------------------------------------------------------------


def of_answer(answer: Mapping[str, Any]) -> dict[int, list[Placed]]:
    """Return the texts of each choice (for `/v1/responses`: of each output item)."""
    texts_by_choice: dict[int, list[Placed]] = {}
    for number, choice in enumerate(answer.get("choices") or []):
        texts_by_choice[number] = [
            Placed(("choices", number, *where), Text(text, "assistant", number))
            for where, text in texts_in(dict(choice), skipped_keys=REVEALING_FIELDS)
        ]
    for number, item in enumerate(answer.get("output") or []):
        texts_by_choice[number] = [
            Placed(("output", number, *where), Text(text, "assistant", number)) for where, text in texts_in(dict(item))
        ]
    if isinstance(text := answer.get("output_text"), str):
        texts_by_choice.setdefault(0, []).append(Placed(("output_text",), Text(text, "assistant", 0)))
    return texts_by_choice


_ENVELOPE = frozenset(
    {"id", "object", "model", "system_fingerprint", "service_tier", "provider", "item_id", "response_id"}
)
_NAME = re.compile(r"[\w./:@+-]{0,128}")


def is_name(key: str | int, text: str) -> bool:
    """Return whether a text of an event names the answer, its model or its server, as each event of a stream does."""
    return key in _ENVELOPE and _NAME.fullmatch(text) is not None


REVEALING_FIELDS = ("logprobs", "token_ids", "prompt_token_ids", "prompt_logprobs", "stop_reason")
"""Fields that reveal an answer's text in another form."""


def withheld(answer: dict[str, Any], number: int) -> dict[str, Any]:
    """Return an answer with the text of one choice removed."""
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


def without_revealing_fields(answer: dict[str, Any], number: int) -> dict[str, Any]:
    """Return an answer without the fields that would reveal the text of a masked choice."""
    changed = copy.deepcopy(answer)
    if changed.get("choices"):
        for name in REVEALING_FIELDS:
            changed["choices"][number].pop(name, None)
    changed.pop("prompt_logprobs", None)
    changed.pop("output_text", None)
    return changed
