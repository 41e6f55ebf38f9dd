"""`dstune generate`."""

from __future__ import annotations

from dstune.core.verb import MEASURE, Verb, verb


@verb
class Generate(Verb):
    name = "generate"
    summary = "write text with a run, an export or a model"
    group = MEASURE
    action = "dstune.inference.generate:main"
    other_names = (
        (("chat", "sample"), "`dstune generate RUN --prompt TEXT`"),
        (("infer", "inference"), "`dstune generate RUN` for text, `dstune predict RUN` for labels"),
    )
