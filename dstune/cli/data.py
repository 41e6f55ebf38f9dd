"""`dstune data`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dstune.core.verb import START, VERBS, Verb, Words, verb


@verb
class Data(Verb):
    name = "data"
    summary = "`data show`: show rows as the model sees them, their lengths and repetitions"
    group = START
    action = "dstune.show.command:main"
    overrides = True

    def parser(self) -> argparse.ArgumentParser | None:
        from dstune.core.arguments import parser_of

        return parser_of(self.function(), ["show"])

    def words(self, words_before: Sequence[str]) -> Words:
        if words_before:
            return super().words(words_before)
        wings = [name.removeprefix("data ") for name in VERBS.without_installed() if name.startswith("data ")]
        return Words(["show", *wings])
