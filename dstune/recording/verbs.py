"""`dstune record`, `dstune retrain` and `dstune compare`."""

from __future__ import annotations

from dstune.core.verb import HOSTED, Verb, verb


@verb
class Record(Verb):
    name = "record"
    summary = "keep jobs, files, models and answers of a hosted service before it is switched off"
    group = HOSTED
    action = "dstune.recording.command:main"
    other_names = ((("backup", "snapshot"), "`dstune record FOLDER --server URL`"),)


@verb
class Retrain(Verb):
    name = "retrain"
    summary = "train an open model as a recorded job trained the hosted one"
    group = HOSTED
    action = "dstune.recording.retrain:main"
    overrides = True


@verb
class Compare(Verb):
    name = "compare"
    summary = "tell whether another model answers your prompts as well as the old one"
    group = HOSTED
    action = "dstune.recording.compare:main"
