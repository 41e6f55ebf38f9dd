"""Refuse rows with audio or video, and with images in places where no task reads them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from typing import Any

from dstune.data.problems import RowError

UNREAD = "no task reads audio or video"
NO_PLACE = "images are read from the column 'images' and from parts of a content"

PARTS = {
    "image": "an image",
    "image_url": "an image",
    "input_image": "an image",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
    "video": "a video",
    "video_url": "a video",
}
"""The kind of media that a part of a message holds, by the part's type."""

COLUMNS = {
    "image": "images",
    "images": "images",
    "audio": "audio",
    "audios": "audio",
    "video": "videos",
    "videos": "videos",
}
"""The kind of media that a column, or a key of a message, holds, by its name."""

_MARKER = re.compile(
    r"""
    <image>(?!\s+(?:tag|element|token|placeholder)s?\b)
    | (?:^|(?<=\n)|(?<=>))<(?:audio|video)>  # also a tag of HTML, so only at an edge, as LLaMA-Factory and ms-swift write it
    | <(?:audio|video)>(?=\s*(?:$|\n|<))
    | <img>\s*(?=\S+?(?:://|\.(?:png|jpe?g|webp|gif|bmp)\b))
    """,
    re.VERBOSE,
)
"""Markers in a text that stand for media. HTML writes an address as an attribute of `<img>`, not after it."""

TEXTS = ("messages", "prompt", "completion", "chosen", "rejected")


def refuse_columns(fields: Mapping[str, Any], where: str = "", used: Collection[str] = ()) -> None:
    """Raise RowError if a column holds media and is not in `used`. where: the message, if `fields` are the keys of one."""
    if COLUMNS.keys().isdisjoint(fields):
        return
    for column, kind in COLUMNS.items():
        if column in fields and column not in used and holds_something(fields[column]):
            place = f"{where}: the key {column!r}" if where else f"column {column!r}"
            raise RowError(f"{place} holds {kind}; {NO_PLACE if kind == 'images' else UNREAD}")


def refuse_markers(row: Mapping[str, Any]) -> None:
    """Raise RowError if a text of a normalised row contains a marker of media."""
    for key in TEXTS:
        value = row.get(key, ())
        texts: Iterable[str] = (
            [value] if isinstance(value, str) else chain.from_iterable(_texts(item.get("content")) for item in value)
        )
        for text in texts:
            # Testing for "<" first is faster than the pattern alone.
            if text and "<" in text and (marker := marker_in(text)):
                missing = "the row has no images" if marker.startswith("<im") else UNREAD
                raise RowError(f"the marker {marker} stands for media in {text!r:.60}; {missing}")


def _texts(content: Any) -> list[str]:
    """Return the texts of a message's content."""
    return [part.get("text", "") for part in content] if isinstance(content, list) else [content or ""]


def marker_in(text: str) -> str:
    """Return the first marker of media in `text`; empty if there is none.

    A marker that is closed like an element of XML or HTML, or quoted as code, does not count.
    """
    for match in _MARKER.finditer(text):
        marker = match.group().strip()
        is_element = marker != "<img>" and f"</{marker[1:]}" in text[match.end() :]
        is_code = text.count("`", 0, match.start()) % 2
        if not is_element and not is_code:
            return marker
    return ""


def holds_something(value: Any) -> bool:
    """Return whether a value is not empty at any depth: in Parquet, every row has the columns of all rows."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(map(holds_something, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(holds_something, value))
    return value is not None
