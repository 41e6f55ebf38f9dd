"""`dstune evaluate`."""

from __future__ import annotations

from dstune.core.verb import Verb, verb


@verb
class Evaluate(Verb):
    name = "evaluate"
    summary = "metrics of a run, an export or a model on a split"
    action = "dstune.evaluation.command:main"
    other_names = ((("test", "eval", "validate"), "`dstune evaluate RUN`"),)
    overrides = True
