"""What the rows of each part are read from, with the files that are there."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError, collected
from dstune.data import sources
from dstune.data.inputs import PARTS, of_training
from dstune.data.rows import check_columns
from dstune.data.stream import FileShard, Stream


@dataclass(frozen=True)
class Input:
    """What some rows are read from."""

    key: str
    """The configuration key that names it."""
    files: list[sources.DataFile]
    config: RunConfig
    """The run's configuration with the format and columns of these rows."""
    stream: Stream | None = None
    """With `data.streaming`, the training rows."""


Inputs = dict[str, dict[str, Input]]
"""By part, then by the name of the source, which is empty for all but a mixture's training rows."""


def find_inputs(config: RunConfig) -> Inputs:
    """Raises UserError with all that name nothing."""
    if config.data.train is None and not config.data.mixture:
        fix = "give a file, a glob, or a sample such as sample://chitchat"
        raise UserError(Problem(where="data.train", reason="no training data given", fix=fix))
    problems: list[Problem] = []
    inputs: Inputs = {}
    expected = {"train": of_training(config)}
    expected |= {part: {"": (f"data.{part}", config)} for part in PARTS[1:]}
    for part, named in expected.items():
        for name, (key, own) in named.items():
            if getattr(own.data, part) is None:
                continue
            with collected(problems):
                check_columns(own.data.columns)
                files = sources.of_part(own.data, part, key)
                streamed = own.data.streaming and part == "train"
                stream = Stream([FileShard(file) for file in files], own.trainer.seed) if streamed else None
                inputs.setdefault(part, {})[name] = Input(key, files, own, stream)
    if problems:
        raise UserError(problems)
    return inputs
