"""Marks between which models write their reasoning, and functions that look for them."""

from __future__ import annotations

import re
from collections.abc import Collection

MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|think_start|>", "<|think_end|>"),
    ("<|channel>thought", "<channel|>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
)
"""The texts that open and close reasoning, by model family."""

_CLOSED = re.compile(
    r"\s*(?:" + "|".join(rf"{re.escape(opening)}.*?{re.escape(closing)}" for opening, closing in MARKS) + r")\s*", re.S
)


def is_closed(text: str) -> bool:
    """Return whether `text` is only white space, or only reasoning that is opened and closed."""
    return not text.strip() or _CLOSED.fullmatch(text) is not None


def ends_thought(prompt: str, text: str) -> bool:
    """Return whether `text` is a closing mark of reasoning that `prompt` never opens."""
    return any(text.strip() == closing and opening not in prompt for opening, closing in MARKS)


def opens(text: str) -> bool:
    """Return whether `text` begins with the mark that opens reasoning."""
    return text.lstrip().startswith(tuple(opening for opening, _ in MARKS))


def is_open(prompt: str) -> bool:
    """Return whether a prompt ends with the mark that opens reasoning."""
    return prompt.rstrip().endswith(tuple(opening for opening, _ in MARKS))


def marks_of(template: str, tokens: Collection[str]) -> tuple[str, str] | None:
    """Return the marks that a chat template contains, otherwise those among the vocabulary's `tokens`; None without either."""
    in_template = (marks for marks in MARKS if marks[1] in template)
    in_vocabulary = (marks for marks in MARKS if all(mark in tokens for mark in marks))
    return next(in_template, None) or next(in_vocabulary, None)


def inlined(content: str, reasoning: str, marks: tuple[str, str]) -> str:
    """Return `content` with `reasoning` between `marks` in front of it. Marks such as `<think>` get a line of their own."""
    opening, closing = marks
    if opening.startswith("<") and opening[1:-1].isalpha():
        return f"{opening}\n{reasoning.strip()}\n{closing}\n" + (f"\n{content}" if content else "")
    return f"{opening}{reasoning.strip()}{closing}{content}"
