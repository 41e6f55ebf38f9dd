"""Rewards for how much is written, and in what."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from dstune.protocols import Reward, reward


@reward
class WordCount(Reward):
    """1 for a completion of as many words as the column `words` says, falling linearly to 0 at none and at twice as many."""

    name = "word_count"
    reads_texts = True
    columns = ("words",)

    def __call__(
        self, prompts: Any, completions: Sequence[str], completion_ids: Any, **columns: Sequence[Any]
    ) -> list[float | None]:
        return [
            None if not words else max(0.0, 1 - abs(len(text.split()) - words) / words)
            for text, words in zip(completions, columns["words"], strict=True)
        ]


@reward
class Script(Reward):
    """The share of a completion's letters that are of the script in the column `script`, as Unicode names it (`LATIN`, `CYRILLIC`,
    `ARABIC`, `CJK`, `HIRAGANA`, `HANGUL`, ...; several with `+`): what tells a language with a script of its own."""

    name = "script"
    reads_texts = True
    columns = ("script",)

    def __call__(
        self, prompts: Any, completions: Sequence[str], completion_ids: Any, **columns: Sequence[Any]
    ) -> list[float | None]:
        return [
            None if not script else share_of_script(text, str(script).upper().split("+"))
            for text, script in zip(completions, columns["script"], strict=True)
        ]


def share_of_script(text: str, scripts: Sequence[str]) -> float:
    """Return the share of letters that are of `scripts`; 0 where there is no letter."""
    letters = [unicodedata.name(character, "") for character in text if character.isalpha()]
    return sum(name.startswith(tuple(scripts)) for name in letters) / len(letters) if letters else 0.0
