"""`dstune prune`."""

from __future__ import annotations

from dstune.core.verb import TRAIN, Verb, verb


@verb
class Prune(Verb):
    name = "prune"
    summary = "cut layers and neurons out of a model; task=distillation heals it"
    group = TRAIN
    action = "dstune.compression.command:main"
    overrides = True
    other_names = ((("compress", "shrink", "slim"), "`dstune prune MODEL --layers N --output FOLDER`"),)
