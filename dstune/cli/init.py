"""`dstune init`."""

from __future__ import annotations

from dstune.cli.verb import Verb, verb


@verb
class Init(Verb):
    name = "init"
    summary = "`init plugin KIND FILE`: a plugin that works, to begin from"
    action = "dstune.testing.scaffold:main"
    other_names = ((("new", "create", "scaffold"), "`dstune init plugin task my_task.py`"),)
