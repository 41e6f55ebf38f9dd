"""Words of verbs that may begin with `hardware=NAME`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dstune.core.verb import Words


def with_hardware(words: Words, words_before: Sequence[str]) -> Words:
    """Return `words`, and the names of hardware where the first word behind the verb is asked for."""
    if words_before:
        return words
    from dstune.planning.hardware import DEVICES

    return replace(words, words=[*(f"hardware={name}" for name in DEVICES), *words.words])
