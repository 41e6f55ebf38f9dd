"""`dstune doctor`."""

from __future__ import annotations

from dstune.core.verb import MACHINE, Verb, verb


@verb
class Doctor(Verb):
    name = "doctor"
    summary = "say what this machine or cluster can train, and what is missing"
    group = MACHINE
    action = "dstune.launch.doctor:main"
    needs_plugins = False
    overrides = True
    takes_files = False
