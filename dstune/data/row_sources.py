"""Find the files that the rows of each part are read from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError, collected
from dstune.data import sources
from dstune.data.inputs import PARTS, of_training
from dstune.data.rows import check_columns
from dstune.data.stream import FileShard, Stream


@dataclass(frozen=True)
class Input:
    """The files of one source of rows."""

    key: str
    """The configuration key that names it."""
    files: list[sources.DataFile]
    config: RunConfig
    """The run's configuration with the format and columns of these rows."""
    stream: Stream | None = None
    """With `data.streaming`, the stream of training rows."""

    @cached_property
    def file_digests(self) -> list[tuple[str, str]]:
        """The name and the digest of each file; of a stream, what identifies its shards without reading all of them."""
        if self.stream is not None:
            return [(name, identity) for name, identity in self.stream.shards()]
        return [(str(file), sources.fingerprint(file)) for file in self.files]

    @property
    def is_local(self) -> bool:
        """Whether the content of the files may change: they are not those of a hub's commit or a table's version."""
        return not any(file.digest for file in self.files)


Inputs = dict[str, dict[str, Input]]
"""By part, then by the source's name, which is empty except for the training rows of a mixture."""


def find_inputs(config: RunConfig) -> Inputs:
    """Return the inputs that the keys of `data` name. Raises UserError with all keys that name no file."""
    if config.data.train is None and not config.data.mixture:
        fix = "give a file, a glob, or a sample such as sample://chitchat"
        raise UserError(Problem(where="data.train", reason="no training data given", fix=fix))
    problems: list[Problem] = []
    inputs: Inputs = {}
    configs_by_part = {"train": of_training(config)}
    configs_by_part |= {part: {"": (f"data.{part}", config)} for part in PARTS[1:]}
    for part, config_by_source in configs_by_part.items():
        for name, (key, source_config) in config_by_source.items():
            if getattr(source_config.data, part) is None:
                continue
            with collected(problems):
                check_columns(source_config.data.columns)
                files = sources.of_part(source_config.data, part, key)
                streamed = source_config.data.streaming and part == "train"
                stream = Stream([FileShard(file) for file in files], source_config.trainer.seed) if streamed else None
                inputs.setdefault(part, {})[name] = Input(key, files, source_config, stream)
    if problems:
        raise UserError(problems)
    return inputs
