"""Texts written for dstune: frames and goals of attacks, everyday sentences with words of attacks, notes that sound like
instructions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from dstune.guard.attacks.texts import ATTACK, BENIGN, Text, hash_fraction

PACKAGE = "dstune"
_FOLDER = Path(__file__).parent


def _lines(name: str) -> Iterator[list[str]]:
    for line in (_FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            yield line.split("\t")


def _goals() -> dict[str, list[str]]:
    goals_by_language: dict[str, list[str]] = {}
    for language, goal in _lines("goals"):
        goals_by_language.setdefault(language, []).append(goal)
    return goals_by_language


def goals(language: str = "en", *, held_out: bool = False) -> list[str]:
    """Return goals of attackers; every fourth goal of a language is held out of training."""
    return [goal for number, goal in enumerate(_goals()[language]) if (number % 4 == 3) == held_out]


def frames(families: Sequence[str], language: str = "en") -> list[tuple[str, str]]:
    """Return the family and the text of each frame, with a placeholder for a goal."""
    return [
        (family, frame)
        for family, spoken, frame in _lines("frames")
        if family in families and spoken == language and "{goal}" in frame
    ]


def attacks(each: int, *, held_out: bool = False) -> Iterator[Text]:
    """Yield every frame with `each` goals; a frame without a placeholder once. held_out: use the goals that training never
    contains."""
    for number, (family, language, frame) in enumerate(_lines("frames")):
        direction = "tool_result" if family == "indirect" else "input"
        group = f"frame:{number}"
        if "{goal}" not in frame:
            if not held_out:
                yield Text(frame, ATTACK, PACKAGE, family, group, direction, language)
            continue
        for goal in sorted(goals(language, held_out=held_out), key=lambda goal: hash_fraction(frame + goal))[:each]:
            yield Text(frame.replace("{goal}", goal), ATTACK, PACKAGE, family, group, direction, language)


def not_inject() -> Iterator[Text]:
    """Yield everyday sentences that contain a trigger word of attacks, grouped by word."""
    for word, language, sentence in _lines("not_inject"):
        yield Text(sentence, BENIGN, "not-inject", "hard", f"word:{word.lower()}", "input", language)


def notes() -> Iterator[Text]:
    for number, (language, note) in enumerate(_lines("notes")):
        yield Text(note, BENIGN, "notes", "hard", f"note:{number}", "tool_result", language)
