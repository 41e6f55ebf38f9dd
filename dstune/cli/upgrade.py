"""`dstune upgrade`."""

from __future__ import annotations

from dstune.core.verb import TRAIN, Verb, verb


@verb
class Upgrade(Verb):
    name = "upgrade"
    summary = "bring the files of an earlier version's run to the present format"
    group = TRAIN
    action = "dstune.launch.upgrade:main"
