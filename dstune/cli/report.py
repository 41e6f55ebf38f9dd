"""`dstune report`."""

from __future__ import annotations

from dstune.core.verb import MEASURE, Verb, verb


@verb
class Report(Verb):
    name = "report"
    summary = "write one HTML page about a run, a sweep, or several runs side by side"
    group = MEASURE
    action = "dstune.report.command:main"
