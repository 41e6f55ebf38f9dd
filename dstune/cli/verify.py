"""`dstune verify`."""

from __future__ import annotations

from dstune.core.verb import Verb, verb


@verb
class Verify(Verb):
    name = "verify"
    summary = "whether the installed stack computes the right gradients"
    action = "dstune.launch.verify:main"
    overrides = True
    needs_plugins = False
