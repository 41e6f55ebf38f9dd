"""`dstune models`."""

from __future__ import annotations

from dstune.cli.verb import Verb, verb


@verb
class Models(Verb):
    name = "models"
    summary = "models that a task can start from, what they take, and how good they are untuned"
    action = "dstune.catalogue:main"
    needs_plugins = False
    overrides = True
    on_hardware = True
    further_words = ("hardware=", "nodes=")
