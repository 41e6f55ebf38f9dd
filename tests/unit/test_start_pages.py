"""The start pages say what is there: messages of the code, in the words of the code."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TROUBLE = (ROOT / "docs" / "start" / "when-it-goes-wrong.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^> `(.+)`$", TROUBLE, re.MULTILINE)


@cache
def texts() -> tuple[str, ...]:
    """Every text of the code, with `…` for what is filled in when it is printed."""
    found = set()
    for file in (ROOT / "dstune").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return tuple(found)


def is_printed(message: str) -> bool:
    """Whether one text of the code has the words of `message` in this order."""
    pattern = re.compile(".*".join(re.escape(words.strip()) for words in message.split("…")), re.DOTALL)
    return any(pattern.search(text) for text in texts())


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_is_one_of_the_code(message: str) -> None:
    assert is_printed(message)


def test_there_are_enough_entries_and_a_wrong_one_would_be_found() -> None:
    assert len(re.findall(r"^### ", TROUBLE, re.MULTILINE)) >= 30
    assert not is_printed("a rank takes at most … GiB")
