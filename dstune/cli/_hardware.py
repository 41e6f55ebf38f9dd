"""Words of verbs that may begin with `hardware=NAME`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dstune.core.verb import Words


def with_hardware(found: Words, given: Sequence[str]) -> Words:
    """`found`, and the names of hardware where the first word behind the verb is asked for."""
    if given:
        return found
    from dstune.planning.hardware import DEVICES

    return replace(found, words=[*(f"hardware={name}" for name in DEVICES), *found.words])
