"""`dstune checkpoints`."""

from __future__ import annotations

from dstune.core.verb import TRAIN, Verb, verb


@verb
class Checkpoints(Verb):
    name = "checkpoints"
    summary = "list, verify or prune the checkpoints of a run"
    group = TRAIN
    action = "dstune.launch.manage:checkpoints"
