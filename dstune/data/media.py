"""Audio and video beside or inside a text, and images where no task looks for them: rows that hold any are refused by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
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
"""What a part of a message holds, by its type."""

COLUMNS = {
    "image": "images",
    "images": "images",
    "audio": "audio",
    "audios": "audio",
    "video": "videos",
    "videos": "videos",
}
"""What a column, or a key of a message, holds."""

_MARKER = re.compile(
    r"""
    <image>(?!\s+(?:tag|element|token|placeholder)s?\b)
    | (?:^|(?<=\n)|(?<=>))<(?:audio|video)>  # of HTML too, so only where LLaMA-Factory and ms-swift put it: at an edge
    | <(?:audio|video)>(?=\s*(?:$|\n|<))
    | <img>\s*(?=\S+?(?:://|\.(?:png|jpe?g|webp|gif|bmp)\b))
    """,
    re.VERBOSE,
)
"""Where a text has the place of a picture or a sound; `<img>` of HTML encloses no address."""

TEXTS = ("messages", "prompt", "completion", "chosen", "rejected")


def refuse_columns(fields: Mapping[str, Any], where: str = "", used: Collection[str] = ()) -> None:
    """Raises RowError where a column that is not `used`, or (with `where`) a key of that message, holds media."""
    if COLUMNS.keys().isdisjoint(fields):
        return
    for column, kind in COLUMNS.items():
        if column in fields and column not in used and holds_something(fields[column]):
            place = f"{where}: the key {column!r}" if where else f"column {column!r}"
            raise RowError(f"{place} holds {kind}; {NO_PLACE if kind == 'images' else UNREAD}")


def refuse_markers(row: Mapping[str, Any]) -> None:
    """Raises RowError where a text of a normalised row has a place for media."""
    for key in TEXTS:
        value = row.get(key, ())
        for text in (
            (value,)
            if isinstance(value, str)
            else (text for message in value for text in _texts(message.get("content")))
        ):
            # The pattern alone would be slower on texts without a "<".
            if text and "<" in text and (marker := marker_in(text)):
                missing = "the row has no images" if marker.startswith("<im") else UNREAD
                raise RowError(f"the marker {marker} stands for media in {text!r:.60}; {missing}")


def _texts(content: Any) -> list[str]:
    """Return the texts of a message's content."""
    return [part.get("text", "") for part in content] if isinstance(content, list) else [content or ""]


def marker_in(text: str) -> str:
    """Return the first marker of media in `text`, if any: not one that is closed as an element of XML or HTML is, or is quoted
    as code."""
    for match in _MARKER.finditer(text):
        marker = match.group().strip()
        is_element = marker != "<img>" and f"</{marker[1:]}" in text[match.end() :]
        is_code = text.count("`", 0, match.start()) % 2
        if not is_element and not is_code:
            return marker
    return ""


def holds_something(value: Any) -> bool:
    """Return whether a value says anything: Parquet gives every row the columns of all of them."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(map(holds_something, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(holds_something, value))
    return value is not None
