"""`dstune status`."""

from __future__ import annotations

from dstune.core.verb import TRAIN, Verb, verb


@verb
class Status(Verb):
    name = "status"
    summary = "say where a run stands"
    group = TRAIN
    action = "dstune.launch.manage:status"
