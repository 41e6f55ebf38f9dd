"""`dstune init`."""

from __future__ import annotations

from collections.abc import Sequence

from dstune.core.verb import START, Verb, Words, verb


class InitPlugin(Verb):
    """`dstune init plugin KIND FILE`, which is no verb of its own."""

    name = "init plugin"
    summary = "a plugin that works, to begin from"
    action = "dstune.testing.scaffold:main"


@verb
class Init(Verb):
    name = "init"
    summary = "write a configuration file for your rows and this machine, or a plugin to begin from"
    group = START
    action = "dstune.launch.starter:main"
    other_names = ((("new", "create", "scaffold", "setup", "wizard"), "`dstune init rows.jsonl` writes my.yaml"),)
    overrides = True

    def run(self, arguments: list[str]) -> int:
        return InitPlugin().run(arguments) if arguments[:1] == ["plugin"] else super().run(arguments)

    def words(self, words_before: Sequence[str]) -> Words:
        return InitPlugin().words(words_before) if words_before[:1] == ["plugin"] else super().words(words_before)
