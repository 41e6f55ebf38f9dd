"""`dstune prune`."""

from __future__ import annotations

from dstune.core.verb import Verb, verb


@verb
class Prune(Verb):
    name = "prune"
    summary = "a smaller model, cut from layers and neurons of a larger one; healed by task=distillation"
    action = "dstune.compression.command:main"
    overrides = True
    other_names = ((("compress", "shrink", "slim"), "`dstune prune MODEL --layers N --output FOLDER`"),)
