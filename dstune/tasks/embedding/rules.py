"""Rules of task=embedding."""

from __future__ import annotations

from collections.abc import Iterator

from dstune.config.convert import format_value
from dstune.config.schema import Precision, RunConfig
from dstune.core.errors import Problem


def check(config: RunConfig) -> Iterator[Problem]:
    if config.trainer.global_batch_size < 2:
        yield Problem(
            "trainer.global_batch_size",
            "the other pairs of a step are what an anchor is told apart from, and there are none",
            "32 or more",
            format_value(config.trainer.global_batch_size),
        )
    if config.trainer.precision is Precision.fp16:
        # The gradient of a vector goes into the second pass as a number of the loss, whose scale is found by overflows.
        yield Problem(
            "trainer.precision",
            "the loss of task=embedding is computed from vectors of two passes, which fp16's loss scale was not tried with",
            "trainer.precision=bf16",
            "fp16",
        )
