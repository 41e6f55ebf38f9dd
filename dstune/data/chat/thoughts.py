"""Marks between which models write their reasoning, and whether a prompt leaves one open."""

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
"""The text that opens reasoning and the one that closes it, of the families that have such marks."""

_CLOSED = re.compile(
    r"\s*(?:" + "|".join(rf"{re.escape(opening)}.*?{re.escape(closing)}" for opening, closing in MARKS) + r")\s*", re.S
)


def is_closed(text: str) -> bool:
    """Return whether `text` is white space, or reasoning that is opened and closed, and nothing else."""
    return not text.strip() or _CLOSED.fullmatch(text) is not None


def ends_thought(prompt: str, text: str) -> bool:
    """Return whether `text`, with which `prompt` ends, closes reasoning that nothing opened behind the last answer."""
    return any(text.strip() == closing and opening not in prompt for opening, closing in MARKS)


def opens(text: str) -> bool:
    """Return whether `text` begins with the mark that opens reasoning."""
    return text.lstrip().startswith(tuple(opening for opening, _ in MARKS))


def is_open(prompt: str) -> bool:
    """Return whether a prompt ends behind the mark that opens reasoning."""
    return prompt.rstrip().endswith(tuple(opening for opening, _ in MARKS))


def marks_of(template: str, tokens: Collection[str]) -> tuple[str, str] | None:
    """Return the marks that a chat template names, else those that are `tokens` of the vocabulary, else nothing."""
    in_template = (marks for marks in MARKS if marks[1] in template)
    in_vocabulary = (marks for marks in MARKS if all(mark in tokens for mark in marks))
    return next(in_template, None) or next(in_vocabulary, None)


def inlined(content: str, reasoning: str, marks: tuple[str, str]) -> str:
    """Return a content that begins with its reasoning between `marks`, each of `<think>` and its like on a line of its own."""
    opening, closing = marks
    if opening.startswith("<") and opening[1:-1].isalpha():
        return f"{opening}\n{reasoning.strip()}\n{closing}\n" + (f"\n{content}" if content else "")
    return f"{opening}{reasoning.strip()}{closing}{content}"
