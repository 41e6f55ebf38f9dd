"""`dstune export`."""

from __future__ import annotations

from dstune.core.verb import MEASURE, Verb, verb


@verb
class Export(Verb):
    name = "export"
    summary = "hand over a checkpoint as a plain Hugging Face folder, or as GGUF"
    group = MEASURE
    action = "dstune.cli._export:main"
    other_names = ((("merge",), "`dstune export RUN --merge`"), (("convert",), "`dstune export RUN`"))
