"""`dstune status`."""

from __future__ import annotations

from dstune.core.verb import Verb, verb


@verb
class Status(Verb):
    name = "status"
    summary = "where a run stands"
    action = "dstune.launch.manage:status"
