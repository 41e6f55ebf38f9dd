"""`dstune upgrade`."""

from __future__ import annotations

from dstune.core.verb import Verb, verb


@verb
class Upgrade(Verb):
    name = "upgrade"
    summary = "bring the files of an earlier version's run to the present format"
    action = "dstune.launch.upgrade:main"
