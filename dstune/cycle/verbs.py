"""`dstune cycle`."""

from __future__ import annotations

from dstune.core.verb import SERVE, Verb, verb


@verb
class Cycle(Verb):
    name = "cycle"
    summary = "train a served model again from feedback on its answers, with gates"
    group = SERVE
    action = "dstune.cycle.command:main"
    other_names = ((("continual",), "`dstune cycle CONFIG`"),)
