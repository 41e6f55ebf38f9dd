"""Completion for verbs whose first word may be `hardware=NAME`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dstune.core.verb import Words


def with_hardware(words: Words, words_before: Sequence[str]) -> Words:
    """Return `words`; for the first word after the verb, add `hardware=NAME` for every known device."""
    if words_before:
        return words
    from dstune.planning.hardware import DEVICES

    return replace(words, words=[*(f"hardware={name}" for name in DEVICES), *words.words])
