"""`dstune runs`."""

from __future__ import annotations

from dstune.core.verb import TRAIN, Verb, verb


@verb
class Runs(Verb):
    name = "runs"
    summary = "list the runs below a folder, or the trials of a sweep"
    group = TRAIN
    action = "dstune.launch.runs:main"
    other_names = ((("ls", "list", "trials"), "`dstune runs DIR`"),)
