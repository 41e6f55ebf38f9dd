"""`dstune report`."""

from __future__ import annotations

from dstune.core.verb import Verb, verb


@verb
class Report(Verb):
    name = "report"
    summary = "one HTML page about a run, a sweep, or several runs side by side"
    action = "dstune.report.command:main"
