"""`dstune synthesize`."""

from __future__ import annotations

from dstune.core.verb import START, Verb, verb


@verb
class Synthesize(Verb):
    name = "synthesize"
    summary = "let a served model write rows: answers, instructions, questions, pairs, rewrites"
    group = START
    action = "dstune.synthesize.command:main"
    other_names = ((("distill-data", "generate-data", "self-instruct"), "`dstune synthesize KIND --input FILE`"),)
