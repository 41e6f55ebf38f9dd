"""Detects whether an answer reveals the system prompt: its wording, or a word that occurs only there. A paraphrase or translation
without such a word is not detected."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from dstune.guard.variants import Variant

RUN = 5
"""Words per run."""
LEAST_RUNS = 3
"""Runs of the system prompt in an answer that count as a leak: seven words in a row."""
_WORD = re.compile(r"\w+")
_CODE = re.compile(r"(?=[\w-]*\d)(?=[\w-]*[A-Za-z])[\w-]{8,64}")


def _runs(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return {tuple(words[place : place + RUN]) for place in range(len(words) - RUN + 1)}


@lru_cache(8)  # cached per conversation, for each of its answers and each piece of a stream
def _secret_runs(prompts: tuple[str, ...], public: tuple[str, ...]) -> frozenset[tuple[str, ...]]:
    """Return the runs of words that occur in the prompts and not in `public`."""
    return frozenset().union(*map(_runs, prompts)) - frozenset().union(*map(_runs, public))


def leaked_runs(readings: Sequence[Variant], prompts: Sequence[str], public: Sequence[str]) -> int:
    """Count the runs of words that an answer shares with `prompts`: the most of any of its readings. Runs in `public` (texts of
    users) do not count."""
    hidden = _secret_runs(tuple(prompts), tuple(public)) if prompts else ()
    return max((len(hidden & _runs(reading.text)) for reading in readings), default=0) if hidden else 0


def canaries_in(readings: Sequence[Variant], canaries: Sequence[str], public: Sequence[str]) -> list[str]:
    """Return the canaries that occur in any reading of an answer, also spelled with separators, and not in `public`."""
    shared = "\n".join(public).lower() if canaries else ""
    leaked = []
    for canary in canaries:
        plain = canary.lower()
        squeezed = re.sub(r"[\W_]", "", plain)
        if plain in shared:
            continue
        if any(
            plain in reading.text.lower() or (squeezed and squeezed in re.sub(r"[\W_]", "", reading.text.lower()))
            for reading in readings
        ):
            leaked.append(canary)
    return leaked


def codes_of(prompts: Sequence[str]) -> list[str]:
    """Return words of letters and digits, such as passwords and internal codes."""
    return sorted({match.group() for prompt in prompts for match in _CODE.finditer(prompt)})
