"""`dstune plan`."""

from __future__ import annotations

from collections.abc import Sequence

from dstune.cli._hardware import with_hardware
from dstune.core.verb import Verb, Words, verb


@verb
class Plan(Verb):
    name = "plan"
    summary = "memory of a rank and time of a step for each ZeRO choice, before anything runs"
    action = "dstune.launch.plan:main"
    overrides = True
    further_words = ("hardware=", "nodes=", "price=", "--calibrate", "--json", "--help")

    def parser(self) -> None:
        return None

    def words(self, words_before: Sequence[str]) -> Words:
        return with_hardware(super().words(words_before), words_before)
