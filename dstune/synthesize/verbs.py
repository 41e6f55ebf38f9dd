"""`dstune synthesize`."""

from __future__ import annotations

from dstune.core.verb import Verb, verb


@verb
class Synthesize(Verb):
    name = "synthesize"
    summary = "rows that a served model writes: answers, instructions, questions, pairs, rewrites"
    action = "dstune.synthesize.command:main"
    other_names = ((("distill-data", "generate-data", "self-instruct"), "`dstune synthesize KIND --input FILE`"),)
