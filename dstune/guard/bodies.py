"""The texts in requests and answers, and the same with other texts in their place."""

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
    """A text and where it stands in a body."""

    place: Place
    text: Text


def of_request(route: str, body: Mapping[str, Any]) -> list[Placed]:
    """Return the texts of a request, at most one more than are checked. Raises ApiError where a request holds what cannot be read
    here."""
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
"""Keys whose text says what something is, as long as it is one word."""
IDS = frozenset({"id", "tool_call_id", "call_id"})
MEDIA = frozenset(
    {"image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file", "input_file"}
)
"""Types of parts of a content that hold something other than text."""
DATA = MEDIA | {"audio_url", "file_data", "file_url", "file_id", "source", "url", "data", "base64", "path"}
"""Where such a part holds it, alone or one within the other."""
_DESCRIBES = frozenset({"detail", "format", "media_type", "mime_type"})
"""What a part tells of its picture or sound, in a word."""
_WITHIN = frozenset({"message", "delta", "content", "output"})
"""The way to the parts of a content, or of what a function has answered."""
_KIND = re.compile(r"[\w.-]{0,32}")
_DESCRIPTION = re.compile(r"[\w./+-]{0,32}")
_ID = re.compile(r"[\w.:-]{0,64}")


def of_message(message: Mapping[str, Any], number: int, place: Place = ()) -> Iterator[Placed]:
    """Yield all texts of a message, wherever they stand in it: a template or a model elsewhere may print any of them."""
    role = str(message.get("role", "user"))
    for where, text in texts_in(message):
        yield Placed((*place, *where), Text(text, role, number))


def texts_in(value: Any, but: Collection[str] = ()) -> Iterator[tuple[Place, str]]:
    """Yield each text of a JSON value and where it stands. but: keys that are left out."""
    return ((where, text) for where, text, media in _texts_in(value, but=but) if not media)


def media_in(value: Any) -> set[str]:
    """Return types of the parts of a message of which something is left out."""
    return {media for _, _, media in _texts_in(value) if media}


def _texts_in(
    value: Any, place: Place = (), but: Collection[str] = (), part: str = "", data: bool = True
) -> Iterator[tuple[Place, str, str]]:
    """Yield texts as `texts_in`, with the type of the part whose data a text is; empty where it is to be read.

    part: the type of the media that this is within. data: whether all keys on the way from there are of its data.
    """
    if isinstance(value, str):
        key = place[-1] if place else ""
        if part and data and not _has_space(value):  # prose is none
            yield place, value, part
        elif not _names(key, value, part):
            yield place, value, ""
    elif isinstance(value, dict):
        if media := _media(value, place):
            part, data = media, True
        for key, item in value.items():
            if key not in but:
                yield from _texts_in(item, (*place, key), but, part, data and key in DATA)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts_in(item, (*place, index), but, part, data)


def _has_space(text: str) -> bool:
    # Five times as fast as a regular expression over the megabytes of an image.
    return text != "" and text.split(None, 1) != [text]


def _names(key: str | int, text: str, part: str) -> bool:
    """Return whether a text only says what something is, or which one."""
    return (
        (key in KINDS and _KIND.fullmatch(text) is not None)
        or (key in IDS and _ID.fullmatch(text) is not None)
        or (part != "" and key in _DESCRIBES and _DESCRIPTION.fullmatch(text) is not None)
    )


def _media(value: Mapping[str, Any], place: Place) -> str:
    """Return the type of a part of a content that holds no text; empty for all else, whatever it says that it is: a template
    prints the arguments of a call, and a model reads them."""
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
    """Return who wrote an item that names no role: a tool its output, the model its calls and what it thought."""
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
    """Yield the texts that `/tags` is asked about; a list of words is one text, joined."""
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
    """Return the texts of each choice (of `/v1/responses`: of each item of the output)."""
    texts_by_choice: dict[int, list[Placed]] = {}
    for number, choice in enumerate(answer.get("choices") or []):
        texts_by_choice[number] = [
            Placed(("choices", number, *where), Text(text, "assistant", number))
            for where, text in texts_in(dict(choice), but=TELLING)
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


TELLING = ("logprobs", "token_ids", "prompt_token_ids", "prompt_logprobs", "stop_reason")
"""What tells the text beside the text."""


def withheld(answer: dict[str, Any], number: int) -> dict[str, Any]:
    """Return an answer without one of its choices' text."""
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
    """Return an answer of which a choice was masked: what tells its text otherwise is gone."""
    changed = copy.deepcopy(answer)
    if changed.get("choices"):
        for name in TELLING:
            changed["choices"][number].pop(name, None)
    changed.pop("prompt_logprobs", None)
    changed.pop("output_text", None)
    return changed
