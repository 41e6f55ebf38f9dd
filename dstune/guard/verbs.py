"""`dstune guard`."""

from __future__ import annotations

from dstune.core.verb import Verb, verb


@verb
class Guard(Verb):
    name = "guard"
    summary = "thresholds of a guard's model, and what a guard catches and misses"
    action = "dstune.guard.measure.command:main"
    further_words = ("calibrate", "test")
    other_names = ((("redteam", "attack", "shield"), "`dstune guard test TARGET`"),)
