"""Texts that an engine's tokenizer would turn into special tokens.

dstune trains what somebody wrote as text, even if it reads like the end of a turn (`data/control.py`), and the local engine
renders it so. Other engines parse it: a user's message could close its turn and speak as the system. Such a request is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dstune.core.parsing import read_object
from dstune.serve.errors import ApiError
from dstune.serve.source import Source

WRITTEN = ("messages", "tools", "prompt", "suffix", "input", "instructions")


class SpecialTexts:
    def __init__(self, source: Source):
        folder = source.prompted_as or source.folder
        texts = _special(folder) if folder is not None else []
        self._pattern = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")

    def refuse(self, body: Mapping[str, Any]) -> None:
        """Raises ApiError for the first field that holds such a text."""
        for name in WRITTEN:
            for text in _texts(body.get(name)):
                if found := self._pattern.search(text):
                    reason = (
                        f"Invalid {name}: {found.group()!r} is a control token of this model and may not be written."
                    )
                    raise ApiError(400, reason, param=name, code="control_token")


def _special(folder: Path) -> list[str]:
    found = read_object(folder / "tokenizer.json") or {}
    tokens = [token for token in found.get("added_tokens", []) if token.get("special")]
    return [str(token["content"]) for token in tokens if str(token.get("content", "")).strip()]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
