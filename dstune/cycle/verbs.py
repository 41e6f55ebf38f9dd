"""`dstune cycle`."""

from __future__ import annotations

from dstune.core.verb import Verb, verb


@verb
class Cycle(Verb):
    name = "cycle"
    summary = "train a served model again from what people said of its answers, with gates and a ledger"
    action = "dstune.cycle.command:main"
    other_names = ((("continual",), "`dstune cycle CONFIG`"),)
