"""Conversations, the unit that monitoring compares: each is one entry, however many turns or requests it has."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

TURNS = 16
"""How many first turns of a conversation are compared."""
CHARACTERS = 8000
"""Characters of a turn that are compared."""
PROMPT_FIELDS = ("prompt", "source", "text", "anchor", "question", "query", "input", "text_1", "instruction")
"""Fields with the question of a request or row without messages; the first one with text counts."""


@dataclass(frozen=True)
class Conversation:
    """The part of a conversation that is compared."""

    place: str
    """`FILE:LINE`, or the id of the first request."""
    texts: tuple[str, ...]
    """The questions, turn by turn; the model's answers are not included."""
    time: float | None = None
    """Time of the first turn, in seconds since the epoch."""
    user: str | None = None
    """The user, for `--one-per user`: a hash in the server's logs."""
    key: str | None = None
    label: str | None = None
    """The correct answer from the data or a person, never the model's own answer."""
    correction: str | None = None
    rating: float | None = None
    is_flagged: bool | None = None
    version: str | None = None
    """Version of the model that answered."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The columns that the task's encoder reads, without the answer."""
    answer: str | None = None
    requests: tuple[str, ...] = ()
    """Ids of all its requests."""
    is_batch: bool = False
    """Whether its request contained several texts: a label or correction then says nothing about any single one."""

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    @property
    def digest(self) -> str:
        """A digest that identifies the conversation without storing its text."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def is_batch(body: Mapping[str, Any]) -> bool:
    """Return whether a request contains several texts."""
    lists = (body[name] for name in PROMPT_FIELDS if isinstance(body.get(name), list) and not _is_messages(body[name]))
    return any(len(values) > 1 for values in lists)


def asked_texts(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the questions of a row or request body: the user's turns, or the text of the first of PROMPT_FIELDS. Empty if there
    are none."""
    messages = next(
        (row[name] for name in ("messages", "conversations", "chosen") if _is_messages(row.get(name))), None
    )
    if messages is None and _is_messages(row.get("prompt")):
        messages = row["prompt"]
    if messages is None and _is_messages(row.get("input")):
        messages = row["input"]
    if messages is not None:
        turns = [_text(message.get("content", message.get("value"))) for message in messages if _is_of_user(message)]
        return tuple(turn for turn in turns[:TURNS] if turn)
    if isinstance(row.get("tokens"), list):
        return (_truncate(" ".join(map(str, row["tokens"]))),)
    for name in PROMPT_FIELDS:
        text = _text(_draw_text(row.get(name), row))
        if text:
            second_text = _text(row.get("text_pair", row.get("context", row.get("text_2"))))
            return (_truncate(f"{text}\n{second_text}") if second_text else text,)
    return ()


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(entry, dict) and ("role" in entry or "from" in entry) for entry in value)
    )


def _is_of_user(message: Mapping[str, Any]) -> bool:
    return message.get("role", message.get("from")) in ("user", "human")


def _draw_text(value: Any, row: Mapping[str, Any]) -> Any:
    """Draw one text of a request with several: they belong together, and their mean would resemble no single text."""
    if not (isinstance(value, list) and value and all(isinstance(entry, str) for entry in value)):
        return value
    number = int(hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest(), 16)
    return value[number % len(value)]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return _truncate(value)
    if isinstance(value, list):
        parts = [entry.get("text", "") for entry in value if isinstance(entry, dict)]
        return _truncate("\n".join(part for part in parts if isinstance(part, str)))
    return ""


def _truncate(text: str) -> str:
    return text[:CHARACTERS].strip()


def joined(turns: Iterable[Conversation]) -> list[Conversation]:
    """Join requests of one user that each repeat the previous turns, as chat clients send them; an equal request belongs to the
    same conversation. turns: in time order."""
    conversations: dict[tuple[str | None, str | None, str], list[Conversation]] = {}
    for turn in turns:
        join_request(conversations.setdefault((turn.key, turn.user, turn.texts[0]), []), turn)
    # Those of a beginning lie together: the order of all is that of their first requests.
    return sorted((one for group in conversations.values() for one in group), key=lambda one: one.time or 0.0)


def join_request(conversations: list[Conversation], request: Conversation) -> None:
    """Add a request to the newest conversation whose turns it repeats, or as a new one. conversations: those of its user."""
    for index in reversed(range(len(conversations))):
        earlier = conversations[index]
        if request.texts[: len(earlier.texts)] == earlier.texts:
            conversations[index] = continued(earlier, request)
            return
    conversations.append(request)


def continued(earlier: Conversation, later: Conversation) -> Conversation:
    """Return a conversation with its next request, whose texts are all turns. It keeps the place and the time of its beginning."""
    flags = [flag for flag in (earlier.is_flagged, later.is_flagged) if flag is not None]
    ratings = [rating for rating in (earlier.rating, later.rating) if rating is not None]
    return replace(
        later,
        place=earlier.place,
        time=earlier.time,
        label=later.label or earlier.label,
        rating=min(ratings) if ratings else None,
        is_flagged=any(flags) if flags else None,
        requests=(*earlier.requests, *later.requests),
    )


def one_per(conversations: Sequence[Conversation], kind: str) -> list[Conversation]:
    """Return one conversation per user, or per key, since those of a frequent user resemble each other. Conversations without a
    name all stay."""
    chosen: dict[str, Conversation] = {}
    others = []
    for conversation in conversations:
        name = getattr(conversation, kind)
        if name is None:
            others.append(conversation)
        elif name not in chosen or conversation.digest < chosen[name].digest:
            chosen[name] = conversation
    return [*others, *chosen.values()]


def sampled(conversations: Sequence[Conversation], most: int) -> list[Conversation]:
    """Return at most `most` conversations in their order; always the same ones."""
    if len(conversations) <= most:
        return list(conversations)
    order = sorted(range(len(conversations)), key=lambda number: (conversations[number].digest, number))
    return [conversations[number] for number in sorted(order[:most])]


def digest_of(conversations: Iterable[Conversation]) -> str:
    """Return a digest of a set of conversations."""
    content = "\n".join(sorted(f"{conversation.place} {conversation.digest}" for conversation in conversations))
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
