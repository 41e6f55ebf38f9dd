"""`dstune cancel`."""

from __future__ import annotations

from dstune.core.verb import TRAIN, Verb, verb


@verb
class Cancel(Verb):
    name = "cancel"
    summary = "ask a run to save and stop"
    group = TRAIN
    action = "dstune.launch.manage:cancel"
    other_names = ((("stop", "kill"), "`dstune cancel RUN`"),)
