"""What monitoring compares: conversations, each one entry however many turns or requests it has."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

TURNS = 16
"""Of a conversation, the first turns that are looked at."""
CHARACTERS = 8000
"""Of a turn that are looked at."""
PROMPT_FIELDS = ("prompt", "source", "text", "anchor", "question", "query", "input", "text_1", "instruction")
"""Where a request or a row without messages says what the model is asked; the first that holds text counts."""


@dataclass(frozen=True)
class Conversation:
    """What somebody asked in one go, as far as it is compared."""

    place: str
    """`FILE:LINE`, or the id of the first request."""
    texts: tuple[str, ...]
    """What was asked, turn by turn; answers of the model are not among them."""
    time: float | None = None
    """Of the first turn, in seconds of the epoch."""
    user: str | None = None
    """Whom `--one-per user` tells apart: a hash in the server's logs."""
    key: str | None = None
    label: str | None = None
    """What is right, as the data or a person says; never the model's own answer."""
    correction: str | None = None
    rating: float | None = None
    is_flagged: bool | None = None
    version: str | None = None
    """Of the model that answered."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The columns that the task's encoder reads, without the answer."""
    answer: str | None = None
    requests: tuple[str, ...] = ()
    """Ids of all requests of it."""
    is_batch: bool = False
    """Whether its request had several texts: a label or a correction of it says nothing about any of them."""

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    @property
    def digest(self) -> str:
        """Tells the conversation again without keeping a word of it."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def is_batch(body: Mapping[str, Any]) -> bool:
    """Return whether a request asks several texts at once."""
    lists = (body[name] for name in PROMPT_FIELDS if isinstance(body.get(name), list) and not _is_messages(body[name]))
    return any(len(values) > 1 for values in lists)


def asked_texts(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what a row or the body of a request asks: the turns of the user, or the text of the first of PROMPT_FIELDS. Empty if
    it asks nothing."""
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
        return (_cut(" ".join(map(str, row["tokens"]))),)
    for name in PROMPT_FIELDS:
        text = _text(_drawn(row.get(name), row))
        if text:
            further = _text(row.get("text_pair", row.get("context", row.get("text_2"))))
            return (_cut(f"{text}\n{further}") if further else text,)
    return ()


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(entry, dict) and ("role" in entry or "from" in entry) for entry in value)
    )


def _is_of_user(message: Mapping[str, Any]) -> bool:
    return message.get("role", message.get("from")) in ("user", "human")


def _drawn(value: Any, row: Mapping[str, Any]) -> Any:
    """Draw one text of a request with several: they belong together, and their mean would be like no single text."""
    if not (isinstance(value, list) and value and all(isinstance(entry, str) for entry in value)):
        return value
    number = int(hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest(), 16)
    return value[number % len(value)]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return _cut(value)
    if isinstance(value, list):
        parts = [entry.get("text", "") for entry in value if isinstance(entry, dict)]
        return _cut("\n".join(part for part in parts if isinstance(part, str)))
    return ""


def _cut(text: str) -> str:
    return text[:CHARACTERS].strip()


def joined(turns: Iterable[Conversation]) -> list[Conversation]:
    """Join requests of one user of which each repeats the turns before it, as chat clients send them; an equal request is the same
    conversation. turns: in the order of their time."""
    conversations: list[Conversation] = []
    open_ones: dict[tuple[str | None, str | None, str], list[int]] = {}
    for turn in turns:
        begins = (turn.key, turn.user, turn.texts[0])
        for number in reversed(open_ones.setdefault(begins, [])):
            earlier = conversations[number]
            if turn.texts[: len(earlier.texts)] == earlier.texts:
                conversations[number] = _continued(earlier, turn)
                break
        else:
            open_ones[begins].append(len(conversations))
            conversations.append(turn)
    return conversations


def _continued(earlier: Conversation, later: Conversation) -> Conversation:
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
    """Return of each user, or key, one conversation: of one who asks often, all are alike. Those without a name stay."""
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
    """Return at most so many, the same ones each time, in their order."""
    if len(conversations) <= most:
        return list(conversations)
    order = sorted(range(len(conversations)), key=lambda number: (conversations[number].digest, number))
    return [conversations[number] for number in sorted(order[:most])]


def digest_of(conversations: Iterable[Conversation]) -> str:
    """Return what tells a set of conversations again."""
    content = "\n".join(sorted(f"{conversation.place} {conversation.digest}" for conversation in conversations))
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
