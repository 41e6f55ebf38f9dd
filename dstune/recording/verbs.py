"""`dstune record`."""

from __future__ import annotations

from dstune.core.verb import Verb, verb


@verb
class Record(Verb):
    name = "record"
    summary = "keep jobs, files, models and answers of a hosted service before it is switched off"
    action = "dstune.recording.command:main"
    other_names = ((("backup", "snapshot"), "`dstune record FOLDER --server URL`"),)
