"""Builds the requests for each kind of row, and parses the answers. A request depends only on the input, the settings and its index
(item, sample), so an interrupted synthesis sends exactly the missing ones."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dstune.core.parsing import parse_json

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Item:
    """One row or text of the input."""

    number: int
    place: str
    """FILE:LINE."""
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Ask:
    """One request to the teacher."""

    item: int
    sample: int
    messages: Messages
    seed: int

    @property
    def key(self) -> str:
        return f"{self.item}/{self.sample}"


@dataclass(frozen=True)
class Draft:
    """A row parsed from an answer, before any filter."""

    row: dict[str, Any]
    prompt: str
    """The prompt, as filters read it."""
    answer: str
    """The teacher's answer."""
    item: Item
    samples: tuple[int, ...]
    """Indices of the answers it was made from."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Columns of the input row, for graders."""


class Unusable(Exception):
    """An answer does not have the requested form; the message says why."""


class Kind:
    """A kind of rows."""

    name = ""
    reads = ""
    """What an input row must contain."""
    compares = False
    """Whether a row is made from several answers to the same request."""

    def items(self, rows: Sequence[Item], count: int | None, seed: int) -> list[Item]:
        """Return the items to send requests for, in order."""
        return list(rows[:count])

    def messages(self, item: Item, rows: Sequence[Item], seed: int) -> Messages:
        raise NotImplementedError

    def drafts(self, item: Item, text: str, sample: int) -> Iterator[Draft]:
        """Yield the rows in an answer. Raises Unusable."""
        raise NotImplementedError


def seed_of(seed: int, item: int, sample: int) -> int:
    """Return the seed of one request, below 2**31, the limit of common servers."""
    digest = hashlib.blake2b(f"{seed}/{item}/{sample}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF


def make_requests(
    kind: Kind, items: Sequence[Item], rows: Sequence[Item], samples: int, seed: int, system: str
) -> Iterator[Ask]:
    """Yield all requests, in order."""
    for item in items:
        messages = kind.messages(item, rows, seed)
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        for sample in range(samples):
            yield Ask(item.number, sample, messages, seed_of(seed, item.number, sample))


def prompt_of(item: Item) -> Messages | None:
    """Return the conversation up to where an answer is due; None if the row has none."""
    fields = item.fields
    for name in ("prompt", "messages", "question", "instruction", "query", "text"):
        value = fields.get(name)
        if isinstance(value, str) and value.strip():
            if name == "instruction" and isinstance(input_text := fields.get("input"), str) and input_text.strip():
                value = f"{value}\n\n{input_text}"
            return [{"role": "user", "content": value}]
        if isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value):
            while value and value[-1].get("role") == "assistant":
                value = value[:-1]
            return [{"role": turn["role"], "content": turn.get("content") or ""} for turn in value] or None
    return None


def text_of(item: Item) -> str:
    """Return the document or text of a row; empty if it has none."""
    for name in ("text", "document", "context", "content", "answer", "completion", "output"):
        value = item.fields.get(name)
        if isinstance(value, str) and value.strip():
            return value
    return ""


def joined_texts(messages: Messages) -> str:
    """Return the texts of a conversation, one below the other."""
    return "\n".join(str(turn["content"]) for turn in messages if turn["role"] != "system")


class Answers(Kind):
    name = "answers"
    reads = "a prompt: `prompt`, `messages`, `question`, `instruction` or `text`"

    def messages(self, item: Item, rows: Sequence[Item], seed: int) -> Messages:
        return prompt_of(item) or []

    def drafts(self, item: Item, text: str, sample: int) -> Iterator[Draft]:
        prompt = prompt_of(item) or []
        if not text.strip():
            raise Unusable("the answer is empty")
        row = {"messages": [*prompt, {"role": "assistant", "content": text.strip()}]}
        yield Draft(row, joined_texts(prompt), text.strip(), item, (sample,), item.fields)


class Preferences(Answers):
    """The best and the worst of several answers, by the scores of graders or a reward model (`pipeline._paired`)."""

    name = "preferences"
    compares = True


class Rewrites(Kind):
    name = "rewrites"
    reads = "a text: `text`, `document`, `context`, `content` or `answer`"
    STYLES = (
        "in plain words for a reader who is new to the subject",
        "as a precise reference article",
        "as questions with their answers",
        "in other words, with the same length and all facts",
    )

    def messages(self, item: Item, rows: Sequence[Item], seed: int) -> Messages:
        style = self.STYLES[seed_of(seed, item.number, -1) % len(self.STYLES)]
        ask = f"Rewrite the text below {style}. Keep every fact, add none, and write nothing beside the new text.\n\n"
        return [{"role": "user", "content": ask + text_of(item)}]

    def drafts(self, item: Item, text: str, sample: int) -> Iterator[Draft]:
        if not text.strip():
            raise Unusable("the answer is empty")
        yield Draft({"text": text.strip()}, "", text.strip(), item, (sample,), item.fields)


class Instructions(Kind):
    """New tasks in the style of a few examples (Wang et al. 2023, arXiv:2212.10560)."""

    name = "instructions"
    reads = "a prompt or an instruction, as an example"
    EXAMPLES = 4
    FORM = '{"instruction": "...", "answer": "..."}'

    def items(self, rows: Sequence[Item], count: int | None, seed: int) -> list[Item]:
        return [Item(number, "", {}) for number in range(count or len(rows))]

    def messages(self, item: Item, rows: Sequence[Item], seed: int) -> Messages:
        chosen = random.Random(seed_of(seed, item.number, -1)).sample(list(rows), min(self.EXAMPLES, len(rows)))
        examples = "\n".join(f"- {joined_texts(prompt_of(row) or [])}" for row in chosen)
        ask = (
            "Here are instructions that people give to an assistant:\n"
            f"{examples}\n\nWrite one more instruction on another subject that such people might give, and its answer. "
            f"Reply with one JSON object and nothing else: {self.FORM}"
        )
        return [{"role": "user", "content": ask}]

    def drafts(self, item: Item, text: str, sample: int) -> Iterator[Draft]:
        value = json_in(text)
        instruction, answer = (_filled(value, name) for name in ("instruction", "answer"))
        turns = [{"role": "user", "content": instruction}, {"role": "assistant", "content": answer}]
        yield Draft({"messages": turns}, instruction, answer, item, (sample,))


class Questions(Kind):
    """Questions that a passage answers, each with its passage."""

    name = "questions"
    reads = "a document: `text`, `document`, `context` or `content`"
    PER_PASSAGE = 3
    PASSAGE = 2000
    """Characters."""

    def items(self, rows: Sequence[Item], count: int | None, seed: int) -> list[Item]:
        items: list[Item] = []
        for row in rows:
            for start, passage in passages(text_of(row), self.PASSAGE):
                fields = {"text": passage, "start": start}
                items.append(Item(len(items), row.place, fields))
        return items[:count]

    def messages(self, item: Item, rows: Sequence[Item], seed: int) -> Messages:
        ask = (
            f"Write {self.PER_PASSAGE} questions that the passage below answers, each understandable without it, and their answers "
            'from it alone. Reply with a JSON list and nothing else: [{"question": "...", "answer": "..."}]\n\n'
        )
        return [{"role": "user", "content": ask + item.fields["text"]}]

    def drafts(self, item: Item, text: str, sample: int) -> Iterator[Draft]:
        values = json_in(text)
        for value in values if isinstance(values, list) else [values]:
            question, answer = (_filled(value, name) for name in ("question", "answer"))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            source = {"place": item.place, "start": item.fields["start"], "text": item.fields["text"]}
            yield Draft({"messages": turns, "source": source}, question, answer, item, (sample,))


KINDS: dict[str, Kind] = {
    kind.name: kind for kind in (Answers(), Instructions(), Questions(), Preferences(), Rewrites())
}


def passages(text: str, most: int) -> Iterator[tuple[int, str]]:
    """Yield (first character, passage): consecutive paragraphs joined up to `most` characters."""
    start, end = 0, 0
    for match in re.finditer(r"[^\n].*?(?=\n\s*\n|\Z)", text, flags=re.DOTALL):
        if end > start and match.end() - start > most:
            yield start, text[start:end]
            start = match.start()
        if end <= start:
            start = match.start()
        end = match.end()
        while end - start > most:
            yield start, text[start : start + most]
            start += most
    if end > start and text[start:end].strip():
        yield start, text[start:end]


def json_in(text: str) -> Any:
    """Return the JSON in an answer, which may be inside a fence or between words. Raises Unusable."""
    fenced = re.search(r"```(?:json)?\s*(.*?)```", text, flags=re.DOTALL)
    candidates = [fenced.group(1)] if fenced else []
    candidates.append(text)
    for opening, closing in (("[", "]"), ("{", "}")):
        start, end = text.find(opening), text.rfind(closing)
        if 0 <= start < end:
            candidates.append(text[start : end + 1])
    for candidate in candidates:
        try:
            value = parse_json(candidate)
        except ValueError:
            continue
        if isinstance(value, dict | list):
            return value
    raise Unusable("the answer holds no JSON")


def _filled(value: Any, name: str) -> str:
    """Return a non-empty text field of a JSON object. Raises Unusable."""
    text = value.get(name) if isinstance(value, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise Unusable(f"the answer has no {name}")
    return text.strip()


def digest_of(value: Any) -> str:
    """Return a digest of settings or of a request."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, ensure_ascii=False).encode(), digest_size=12).hexdigest()
