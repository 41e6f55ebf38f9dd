"""`dstune monitor` and `dstune data shift`."""

from __future__ import annotations

from dstune.core.verb import SERVE, Verb, verb


@verb
class Monitor(Verb):
    name = "monitor"
    summary = "tell whether live rows still resemble those that a run was trained on"
    group = SERVE
    action = "dstune.monitor.command:main"
    other_names = ((("drift", "watch"), "`dstune monitor RUN --data LOGS`"),)


@verb
class DataShift(Verb):
    name = "data shift"
    summary = "measure how far rows are from other rows, or from a run's"
    group = SERVE
    action = "dstune.monitor.shift_command:main"
