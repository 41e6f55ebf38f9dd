"""`dstune export`."""

from __future__ import annotations

from dstune.core.verb import Verb, verb


@verb
class Export(Verb):
    name = "export"
    summary = "a checkpoint as a plain Hugging Face folder"
    action = "dstune.cli._export:main"
    other_names = ((("merge",), "`dstune export RUN --merge`"), (("convert",), "`dstune export RUN`"))
