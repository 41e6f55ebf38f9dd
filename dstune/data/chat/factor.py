"""How many samples and tokens conversations become where the chat template rewrites their history, from the first rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

from dstune.config.schema import RunConfig
from dstune.data import sources
from dstune.data.inputs import of_training
from dstune.data.rows import RowError, normalise, recognise
from dstune.data.tokenize import RowTokenizer

ROWS = 200
"""Looked at of each source."""


@dataclass(frozen=True)
class Growth:
    """What rows of conversations become."""

    conversations: int
    """Rows looked at."""
    samples: int
    tokens: int
    """Of all samples."""
    tokens_once: int
    """If each conversation were one sample: of its longest one."""

    @property
    def factor(self) -> float:
        return self.tokens / self.tokens_once if self.tokens_once else 1.0


def growth_of(config: RunConfig, tokenizer: Any) -> Growth:
    """Measure the growth of the first rows of each source of the training data. Raises UserError where they cannot be read or
    rendered."""
    growth = Growth(0, 0, 0, 0)
    for key, source_config in of_training(config).values():
        encode: RowTokenizer | None = None
        numbered = (raw for file in sources.of_part(source_config.data, "train", key) for raw in sources.read(file))
        for raw in islice(numbered, ROWS):
            if raw.fields is None:
                continue
            fmt = recognise(
                raw.fields, source_config.data.columns, source_config.data.format, source_config.task, raw.place
            )
            encode = encode or RowTokenizer(tokenizer, source_config.task, fmt, source_config.data.max_length)
            try:
                row = normalise(raw.fields, fmt, source_config.data.columns, source_config.task)
            except RowError:
                continue  # told where rows are prepared
            lengths = [len(sample.input_ids) for sample in encode.samples([row], [0]) if sample.weight]
            if lengths:
                growth = Growth(
                    growth.conversations + 1,
                    growth.samples + len(lengths),
                    growth.tokens + sum(lengths),
                    growth.tokens_once + max(lengths),
                )
    return growth
