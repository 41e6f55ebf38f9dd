"""`data.split.validation=auto`: decides how many rows to hold out, once, from the rows that exist when a run starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from dstune.config.fields import Automatic
from dstune.config.forgetting import mixes_in
from dstune.config.schema import RunConfig
from dstune.core.errors import UserError
from dstune.data import sources
from dstune.data.inputs import of_training
from dstune.data.rows import RowError, hash_of, normalise, recognise
from dstune.data.split import MANY, SHARE, automatic_share
from dstune.protocols import task_of

WHOLE_FILE_BYTES = 1 << 26
"""A larger JSON array, which would have to be read completely, is assumed to hold many rows."""


def with_share(config: RunConfig) -> tuple[RunConfig, str]:
    """Return `config` with a share in place of `auto`, and the reason.

    Returns it unchanged, with an empty reason, if the key is not `auto` or the run has validation rows of its own. Reads at most
    the first few hundred rows. Bad rows do not count.
    """
    data = config.data
    if not isinstance(data.split.validation, Automatic) or data.validation is not None:
        return config, ""
    hashes: set[int] = set()
    for row_hash in _hashes(config):
        hashes.add(row_hash)
        if len(hashes) == MANY:
            break
    share, reason = SHARE, f"{SHARE:.0%} of the rows are held out"
    if len(hashes) < MANY:
        task = task_of(config.task)
        row_hashes = np.fromiter(hashes, np.uint64, len(hashes))
        share, held_out = automatic_share(row_hashes, labelled=task.has_labels and not task.several_labels)
        reason = f"{held_out} of {len(hashes)} rows are held out"
    return replace(config, data=replace(data, split=replace(data.split, validation=share))), reason


def _hashes(config: RunConfig) -> Iterator[int]:
    """Yield the hashes of the rows that may be held out, in the order of the files."""
    training = list(of_training(config).values())
    for key, source_config in training[:1] if mixes_in(config) else training:
        name: str | None = None
        for file in sources.of_part(source_config.data, "train", key):
            if file.ending == ".json" and file.path.stat().st_size > WHOLE_FILE_BYTES:
                yield from range(MANY)
                return
            for row in sources.read(file):
                if row.fields is None:
                    continue
                try:
                    name = name or recognise(
                        row.fields, source_config.data.columns, source_config.data.format, source_config.task, row.place
                    )
                    fields = normalise(
                        row.fields,
                        name,
                        source_config.data.columns,
                        source_config.task,
                        input_apart=_input_apart(source_config),
                    )
                    yield hash_of(fields, source_config.data.split.seed)
                except (RowError, UserError):  # preparing the rows reports it
                    continue


def _input_apart(config: RunConfig) -> bool:
    return config.model.prompt_template == "alpaca"
