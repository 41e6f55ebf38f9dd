"""`dstune plan`."""

from __future__ import annotations

from collections.abc import Sequence

from dstune.cli._hardware import with_hardware
from dstune.core.verb import TRAIN, Verb, Words, verb


@verb
class Plan(Verb):
    name = "plan"
    summary = "say what fits before anything runs: memory of a rank and time of a step"
    group = TRAIN
    action = "dstune.launch.plan:main"
    overrides = True
    further_words = ("hardware=", "nodes=", "price=", "--calibrate", "--json", "--help")

    def parser(self) -> None:
        return None

    def words(self, words_before: Sequence[str]) -> Words:
        return with_hardware(super().words(words_before), words_before)
