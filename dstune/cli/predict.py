"""`dstune predict`."""

from __future__ import annotations

from dstune.core.verb import MEASURE, Verb, verb


@verb
class Predict(Verb):
    name = "predict"
    summary = "add labels, tags, answers, scores or vectors to rows"
    group = MEASURE
    action = "dstune.inference.predict:main"
    other_names = (
        (("classify", "label", "tag", "embed"), "`dstune predict RUN --text TEXT`"),
        (("score",), "`dstune predict RUN --input FILE`"),
    )
    overrides = True
