"""`dstune plan`."""

from __future__ import annotations

from dstune.cli.verb import Verb, verb


@verb
class Plan(Verb):
    name = "plan"
    summary = "memory of a rank and time of a step for each ZeRO choice, before anything runs"
    action = "dstune.launch.plan:main"
    overrides = True
    on_hardware = True
    further_words = ("hardware=", "nodes=", "price=", "--calibrate", "--json", "--help")

    def parser(self) -> None:
        return None
