"""`dstune train`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dstune.cli.verb import Verb, verb


@verb
class Train(Verb):
    name = "train"
    summary = "compose a run, check it, start its ranks and wait"
    action = "dstune.launch.train:train"
    other_names = (
        (("resume",), "`dstune train RUN` continues a run"),
        (("run", "fit", "sft", "finetune", "fine-tune", "start"), "`dstune train`"),
        (("sweep", "tune", "multirun"), "`dstune train --multirun KEY=A,B`"),
        (("config",), "`dstune train --cfg job` shows the configuration"),
    )
    overrides = True
    takes_files = False
    further_words = ("--json", "--multirun")

    def run(self, arguments: list[str]) -> int:
        if not is_sweep(arguments):
            return super().run(arguments)
        from dstune.sweep.command import main

        return main(arguments)

    def parser(self) -> None:
        return None


def is_sweep(words: Sequence[str]) -> bool:
    """Whether `dstune train WORDS` is about several runs."""
    flagged = any(word in ("-m", "--multirun") for word in words)
    return flagged or any("=" not in word and os.path.isfile(os.path.join(word, "sweep.yaml")) for word in words[:1])
