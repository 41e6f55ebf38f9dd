"""Images in requests: accepted as data URLs only, and logged by their digest."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from typing import Any

DATA_URL = re.compile(r"data:image/[\w.+-]{1,64};base64,[A-Za-z0-9+/]{4,}={0,2}")
LOGGED = re.compile(r"sha256:[0-9a-f]{64}")
"""What replaces an image's address in the log."""
_ADDRESS = re.compile(r"\s*[a-z][a-z0-9+.-]{0,16}://", re.I)


def problem_of_address(url: str) -> str:
    """Return what is wrong with an image's address, to follow its name; empty if it is an image's data URL."""
    if DATA_URL.fullmatch(url):
        return ""
    if _ADDRESS.match(url):
        return "is an address, and nothing is fetched for a request: send the image itself (data:image/png;base64,...)"
    return "must be a data URL of an image in base64 (data:image/png;base64,...)"


def asks_about_images(body: Mapping[str, Any]) -> bool:
    """Return whether a request to chat completions or `/v1/responses` contains an image."""
    conversations = (body.get("messages"), body.get("input"))
    return any(any(map(shows_image, messages)) for messages in conversations if isinstance(messages, list))


def shows_image(message: Any) -> bool:
    """Return whether a part of a message's content is an image."""
    content = message.get("content") if isinstance(message, Mapping) else None
    return isinstance(content, list) and any(map(is_image, content))


def is_image(part: Any) -> bool:
    return is_chat_image(part) or is_input_image(part)


def is_chat_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image_url"


def is_input_image(part: Any) -> bool:
    """Return whether a part is an image in the form of `/v1/responses`, whose `image_url` is a string."""
    return isinstance(part, Mapping) and part.get("type") == "input_image"


def without_images(value: Any) -> Any:
    """Return a request for the log, with each image replaced by the SHA-256 and the size of its file."""
    if isinstance(value, Mapping):
        return _image_digest(value) if is_image(value) else {key: without_images(item) for key, item in value.items()}
    return [without_images(item) for item in value] if isinstance(value, list) else value


def _image_digest(part: Mapping[str, Any]) -> dict[str, Any]:
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, Mapping) else image
    try:
        content = base64.b64decode(str(url).partition(",")[2])
    except ValueError:  # wrong base64 length: the engine refuses it
        content = str(url).encode("utf-8", "replace")
    digest, size = f"sha256:{hashlib.sha256(content).hexdigest()}", len(content)
    if is_input_image(part):
        return {"type": "input_image", "image_url": digest, "bytes": size}
    return {"type": "image_url", "image_url": {"url": digest, "bytes": size}}
