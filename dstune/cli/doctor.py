"""`dstune doctor`."""

from __future__ import annotations

from dstune.core.verb import Verb, verb


@verb
class Doctor(Verb):
    name = "doctor"
    summary = "what this machine or cluster can run, and what is missing"
    action = "dstune.launch.doctor:main"
    needs_plugins = False
    overrides = True
    takes_files = False
