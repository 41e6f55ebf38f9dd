"""Measure, on the first rows, how many samples and tokens conversations become if the chat template rewrites their history."""

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
"""Number of rows that are measured of each source."""


@dataclass(frozen=True)
class Growth:
    """Counts of conversations and of the samples that they become."""

    conversations: int
    """Number of rows that gave a sample."""
    samples: int
    tokens: int
    """Tokens of all samples."""
    tokens_once: int
    """Tokens if each conversation were one sample: those of its longest sample."""

    @property
    def factor(self) -> float:
        """How many times more tokens are trained than if each conversation were one sample."""
        return self.tokens / self.tokens_once if self.tokens_once else 1.0


def growth_of(config: RunConfig, tokenizer: Any) -> Growth:
    """Measure the growth of the first rows of each training source. Raises UserError if they cannot be read or rendered."""
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
                continue  # reported when the rows are prepared
            lengths = [len(sample.input_ids) for sample in encode.samples([row], [0]) if sample.weight]
            if lengths:
                growth = Growth(
                    growth.conversations + 1,
                    growth.samples + len(lengths),
                    growth.tokens + sum(lengths),
                    growth.tokens_once + max(lengths),
                )
    return growth
