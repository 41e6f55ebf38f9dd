"""`dstune import`."""

from __future__ import annotations

from dstune.core.verb import Verb, verb


@verb
class Import(Verb):
    name = "import"
    summary = "an experiment from another tool's configuration, or a run from its half-finished checkpoint"
    action = "dstune.importing.command:main"
    needs_plugins = False
