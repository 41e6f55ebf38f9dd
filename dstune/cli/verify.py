"""`dstune verify`."""

from __future__ import annotations

from dstune.core.verb import MACHINE, Verb, verb


@verb
class Verify(Verb):
    name = "verify"
    summary = "check whether the installed stack computes the right gradients"
    group = MACHINE
    action = "dstune.launch.verify:main"
    overrides = True
    needs_plugins = False
