"""Find, change and hash the texts of a normalised row of any format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import xxhash

NO_TEXT = frozenset(
    {"label", "labels", "tags", "answers", "tools", "images", "weight", "role", "name", "type", "id", "tool_call_id"}
)
"""Keys whose values nobody wrote as text: they are left unchanged. The arguments of a call are text under any key."""

ARGUMENTS = "arguments"

Row = dict[str, Any]


def map_texts(row: Row, change: Callable[[str], str]) -> Row:
    """Return `row` with every text replaced by `change(text)`. Answers that are parts of a context keep pointing at their text."""
    changed = {key: value if key in NO_TEXT else _mapped(value, change) for key, value in row.items()}
    if row.get("answers") and "context" in row and changed["context"] != row["context"]:
        answers = [_moved(answer, row["context"], changed["context"], change) for answer in row["answers"]]
        changed["answers"] = [answer for answer in answers if answer is not None]
        if not changed["answers"]:
            changed["context"] = ""  # a question whose answer is lost must not become one without an answer
    return changed


def _moved(answer: Row, context: str, changed: str, change: Callable[[str], str]) -> Row | None:
    """Return `answer` (`text`, `start`) in the changed context; None if it no longer occurs there."""
    text, start = change(answer["text"]), len(change(context[: answer["start"]]))
    if not text:
        return None
    if changed[start : start + len(text)] != text:
        places = [match.start() for match in re.finditer(re.escape(text), changed)]
        if not places:
            return None
        start = min(places, key=lambda place: abs(place - start))
    return {"text": text, "start": start}


def _mapped(value: Any, change: Callable[[str], str], no_text: Collection[str] = NO_TEXT) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {
            key: item if key in no_text else _mapped(item, change, () if key == ARGUMENTS else no_text)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_mapped(item, change, no_text) for item in value]
    return value


def texts(row: Row) -> Iterator[str]:
    """Yield the texts of a row in order: columns, words joined into one text, and messages. System prompts are left out, because
    many rows share one and it says little about the row."""
    for key, value in row.items():
        if key == "messages":
            for message in value:
                if message.get("role") != "system":
                    yield from _texts(message)
        elif key in ("tokens", "input_ids"):
            yield " ".join(map(str, value))
        elif key not in NO_TEXT:
            yield from _texts(value)


def _texts(value: Any, no_text: Collection[str] = NO_TEXT) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in no_text:
                yield from _texts(item, () if key == ARGUMENTS else no_text)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, no_text)


def learned_texts(row: Row) -> Iterator[str]:
    """Yield the texts that a model learns to write: the assistant's messages, the completion, the target, the chosen answer, or the
    text of a row that consists of text only."""
    if "chosen" in row:
        yield from _assistant_texts(row["chosen"])
    elif "messages" in row:
        yield from _assistant_texts(row["messages"])
    else:
        answers = [row[key] for key in ("completion", "target") if isinstance(row.get(key), str)]
        if not answers and row.keys() & {"label", "labels"}:
            return
        yield from answers or [row["text"]] * isinstance(row.get("text"), str)


def _assistant_texts(answer: Any) -> Iterator[str]:
    if isinstance(answer, str):
        yield answer
        return
    for message in answer:
        if isinstance(message, dict) and message.get("role") == "assistant":
            yield from _texts(message.get("content"))


def is_empty(row: Row) -> bool:
    """Return whether a text column is blank, or, for messages, whether all are blank and none calls a tool."""
    if "messages" in row:
        calls = any(message.get("tool_calls") for message in row["messages"])
        return not calls and not any(text.strip() for text in texts(row))
    return any(isinstance(value, str) and not value.strip() for key, value in row.items() if key not in NO_TEXT)


def comparable(text: str) -> str:
    """Return `text` in the form that is compared: runs of white space become one space; case is kept."""
    return " ".join(text.split())


def row_hashes(row: Row) -> tuple[int, int]:
    """Return two 64-bit hashes: of the complete row, and of its texts and images without label, system prompt and tools.

    A run of white space counts as one space; white space at the ends of texts does not count.
    """
    row = map_texts(row, comparable)
    content = json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    text = "\x1f".join([*texts(row), *image_digests(row)])
    row_hash, text_hash = (xxhash.xxh3_64_intdigest(part.encode("utf-8", "surrogatepass")) for part in (content, text))
    return row_hash, text_hash


def image_digests(row: Row) -> list[str]:
    """Return the digests of a row's images: rows with the same texts and different images are different rows."""
    return [image["digest"] for image in row.get("images") or () if isinstance(image, dict)]


def near_text(row: Row) -> str:
    """Return the text by which near duplicates are found; case and runs of white space are ignored."""
    return " ".join(" ".join([*texts(row), *image_digests(row)]).casefold().split())
