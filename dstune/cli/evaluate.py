"""`dstune evaluate`."""

from __future__ import annotations

from dstune.core.verb import MEASURE, Verb, verb


@verb
class Evaluate(Verb):
    name = "evaluate"
    summary = "compute the metrics of a run, an export or a model on a split"
    group = MEASURE
    action = "dstune.evaluation.command:main"
    other_names = ((("test", "eval", "validate"), "`dstune evaluate RUN`"),)
    overrides = True
