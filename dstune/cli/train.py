"""`dstune train`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dstune.core.arguments import is_path
from dstune.core.rank_env import from_environment
from dstune.core.verb import TRAIN, Verb, verb


@verb
class Train(Verb):
    name = "train"
    summary = "train a model: check the configuration, start the ranks and wait"
    group = TRAIN
    action = "dstune.launch.train:train"
    other_names = (
        (("resume",), "`dstune train RUN` continues a run"),
        (("run", "fit", "sft", "finetune", "fine-tune", "start"), "`dstune train`"),
        (("sweep", "tune", "multirun"), "`dstune train --multirun KEY=A,B`"),
        (("config",), "`dstune train --cfg job` shows the configuration"),
    )
    overrides = True
    further_words = ("--json", "--multirun")

    def run(self, arguments: list[str]) -> int:
        if is_sweep(arguments):
            from dstune.sweep.command import main

            return main(arguments)
        if arguments and not is_path(arguments[0]) and from_environment(os.environ) is None:
            from dstune.config.flags import hydra_flags, show

            # Here as well as in `action`, whose module takes a tenth of a second to import.
            flags = hydra_flags([word for word in arguments if word != "--json"])
            if flags.shows:
                return show(flags)
        return super().run(arguments)

    def parser(self) -> None:
        return None


def is_sweep(words: Sequence[str]) -> bool:
    """Return whether `dstune train WORDS` starts or continues a sweep."""
    has_flag = any(word in ("-m", "--multirun") for word in words)
    return has_flag or any("=" not in word and os.path.isfile(os.path.join(word, "sweep.yaml")) for word in words[:1])
