"""`dstune import`."""

from __future__ import annotations

from dstune.core.verb import START, Verb, verb


@verb
class Import(Verb):
    name = "import"
    summary = "turn another tool's configuration, or its half-finished checkpoint, into a run"
    group = START
    action = "dstune.importing.command:main"
    needs_plugins = False
