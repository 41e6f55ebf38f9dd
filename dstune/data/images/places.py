"""Bring the image conventions of several tools into one form: which places of a conversation hold an image, and which image.

A normalised row has parts `{type: image}` in the contents of its messages (for a pair of answers, of its prompt), and their images
in order under `images`. This module imports neither torch nor Pillow: the launching process normalises rows too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from dstune.data.problems import RowError, format_value

Reference = str | bytes
"""An image as a row names it: a path, a data URL, or the bytes of its file."""

PLACE = {"type": "image"}
MARKER = "<image>"
"""The text that LLaVA, LLaMA-Factory and ms-swift write in place of an image from the column `images`."""
COLUMN = "images"

MAX_IMAGES = 256
"""Maximum number of images in a row."""

SPEAKERS = ("system", "user", "tool")
"""Roles whose messages may hold images. The assistant is not among them: models see images and write none."""

_OTHERS = ("prompt", "completion", "chosen", "rejected")
"""Keys of a normalised row, apart from `messages`, whose values may be messages."""

_INSIDE = ("bytes", "url", "path", "image", "image_url", "base64", "file_name", "value")
"""Keys under which an object holds an image: those of `datasets`, OpenAI, transformers and LLaMA-Factory."""
_ADDRESS = re.compile(r"\s*(?:https?|ftp|s3|gs)://", re.I)


def is_place(part: Any) -> bool:
    """Return whether a content part is a place for an image."""
    return isinstance(part, Mapping) and part.get("type") == "image"


def part_of_image(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a message part from a file as a place; if the part holds its image, that is under `image`. Raises RowError."""
    image_keys = {key: value for key, value in part.items() if key != "text"}
    reference = _reference(image_keys, where)
    return dict(PLACE) if reference is None else {**PLACE, "image": reference}


def with_images(row: dict[str, Any], column: Any, *, sees: str) -> dict[str, Any]:
    """Return the normalised `row` with a place in its messages for each of its images, and the images as `images` (`Reference`).

    column: the value of the column `images`. Places without their own image take these images in order. If no message has a
    place, each marker `<image>` becomes one; without markers, all images go before the first question. In a pair of answers, only
    the common prompt may have images.
    sees: why the task reads no images; empty if it does. Raises RowError if places and images do not match.
    """
    entries = column if isinstance(column, (list, tuple)) else [column]
    references = [reference for value in entries if (reference := _reference(value, "column 'images'")) is not None]
    key = "prompt" if "chosen" in row else "messages"
    messages: Sequence[dict[str, Any]] = row[key] if isinstance(row.get(key), list) else ()
    has_places = any(is_place(part) for message in messages for part in _parts(message))
    others = [row[other] for other in _OTHERS if other != key and isinstance(row.get(other), list)]
    elsewhere = [message for conversation in others for message in conversation]
    is_elsewhere = any(is_place(part) for message in elsewhere for part in _parts(message))
    if not references and not has_places and not is_elsewhere:
        return row
    if sees or is_elsewhere:
        raise RowError(f"the row holds an image; {sees or 'of a pair only the prompt may, which both answer'}")
    row = _of_messages(row)
    messages = row[key]
    if not has_places:
        messages = _marked(messages) or _in_front(messages, len(references))
    placed, shown = _filled(messages, references)
    if len(shown) > MAX_IMAGES:
        raise RowError(f"the row holds {len(shown)} images, and no row may have more than {MAX_IMAGES}")
    return {**row, key: placed, COLUMN: shown}


def _of_messages(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with its texts turned into messages."""
    roles = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}
    texts = {key: role for key, role in roles.items() if isinstance(row.get(key), str)}
    messages = {key: [{"role": role, "content": row[key]}] for key, role in texts.items()}
    if "completion" not in messages:
        return row | messages
    rest = {key: value for key, value in row.items() if key not in messages}
    return {**rest, "messages": [*messages["prompt"], *messages["completion"]]}


def for_hash(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the row in a form that JSON can hold: images given as bytes are replaced by their digests."""
    if COLUMN not in row:
        return row
    image_names = [xxhash.xxh3_128_hexdigest(image) if isinstance(image, bytes) else image for image in row[COLUMN]]
    return {**row, COLUMN: image_names}


def _filled(
    messages: Sequence[dict[str, Any]], references: Sequence[Reference]
) -> tuple[list[dict[str, Any]], list[Reference]]:
    """Return the messages with bare places, and the images of these places. Raises RowError for too few or too many images."""
    remaining, shown, placed, places = list(references), [], [], 0
    for message in messages:
        parts = []
        for part in _parts(message):
            if is_place(part):
                places += 1
                if (inline_image := part.get("image")) is not None or remaining:
                    shown.append(remaining.pop(0) if inline_image is None else inline_image)
                part = dict(PLACE)
            parts.append(part)
        placed.append({**message, "content": parts} if parts else dict(message))
    if remaining or len(shown) < places:
        count = len(shown) + len(remaining)
        raise RowError(
            f"the row has {count} image{'s' * (count != 1)} and {places} place{'s' * (places != 1)} for "
            f"{'it' if count == 1 else 'them'}"
        )
    return placed, shown


def _marked(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with a place for each marker; an empty list if there is no marker."""
    marked = [_split(message) if message["role"] in SPEAKERS else message for message in messages]
    return marked if any(is_place(part) for message in marked for part in _parts(message)) else []


def _split(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with places for the markers in its texts. The line break that LLaVA writes after a marker is removed."""
    content = message.get("content")
    texts = [content] if isinstance(content, str) else [part["text"] for part in content or () if "text" in part]
    if not any(MARKER in text for text in texts):
        return message
    parts: list[dict[str, Any]] = []
    for text in texts:
        for number, piece in enumerate(text.split(MARKER)):
            if number:
                parts.append(dict(PLACE))
                piece = piece.removeprefix("\n")
            if piece.strip():
                parts.append({"type": "text", "text": piece})
    return {**message, "content": parts}


def _in_front(messages: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return the messages with `count` places before the first question, as TRL and ms-swift do. Raises RowError without one."""
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise RowError("the row has images and no question that could hold them")
    content = messages[first].get("content") or ""
    texts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    question = {**messages[first], "content": [*(dict(PLACE) for _ in range(count)), *texts]}
    return [*messages[:first], question, *messages[first + 1 :]]


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _reference(value: Any, where: str) -> Reference | None:
    """Return the image that a value of a file names; None if it names none. Raises RowError for an address and anything else."""
    if isinstance(value, Mapping):
        return next((inner for key in _INSIDE if (inner := _reference(value.get(key), where)) is not None), None)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value) or None
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        raise RowError(f"{where} holds {format_value(value)}, which is no image: a path, a data URL or bytes are")
    if _ADDRESS.match(value):
        raise RowError(
            f"{where} is the address {value!r:.60}; nothing is fetched while a run trains: download the image and give its path"
        )
    return value
