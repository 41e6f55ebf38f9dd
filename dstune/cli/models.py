"""`dstune models`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dstune.cli.verb import Verb, Words, verb


@verb
class Models(Verb):
    name = "models"
    summary = "models that a task can start from, what they take, and how good they are untuned"
    action = "dstune.catalogue:main"
    overrides = True
    further_words = ("hardware=", "nodes=")

    def words(self, given: Sequence[str]) -> Words:
        found = super().words(given)
        if given:
            return found
        from dstune.planning.hardware import DEVICES

        return replace(found, words=[*(f"hardware={name}" for name in DEVICES), *found.words])
