"""`dstune guard`."""

from __future__ import annotations

from dstune.core.verb import SERVE, Verb, verb


@verb
class Guard(Verb):
    name = "guard"
    summary = "choose thresholds of a guard's model, and measure what a guard catches"
    group = SERVE
    action = "dstune.guard.measure.command:main"
    further_words = ("calibrate", "test")
    other_names = ((("redteam", "attack", "shield"), "`dstune guard test TARGET`"),)
