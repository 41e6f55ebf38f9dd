"""`dstune models`."""

from __future__ import annotations

from collections.abc import Sequence

from dstune.cli._hardware import with_hardware
from dstune.core.verb import START, Verb, Words, verb


@verb
class Models(Verb):
    name = "models"
    summary = "list the models that a task can start from, those that this machine can train first"
    group = START
    action = "dstune.catalogue:main"
    needs_plugins = False
    overrides = True
    further_words = ("hardware=", "nodes=")

    def words(self, words_before: Sequence[str]) -> Words:
        return with_hardware(super().words(words_before), words_before)
