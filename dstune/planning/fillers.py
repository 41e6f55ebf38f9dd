"""Filler micro-batches, which ranks compute so that all of them have the same number."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from dstune.config.schema import Automatic, RunConfig
from dstune.protocols import parallelism_of

IDLE = 0.1
"""A warning is given if at least this share of a step's micro-batches are fillers."""


def shares(config: RunConfig, ranks: int, rows: int) -> tuple[int, int]:
    """Return the number of micro-batches of `rows` rows that all ranks together compute in a step, and how many are fillers."""
    groups = max(1, ranks // parallelism_of(config.parallel).size)
    needed = ceil(config.trainer.global_batch_size / rows)
    computed = groups * ceil(needed / groups)
    return computed, computed - needed


def rows_without_fillers(config: RunConfig, ranks: int) -> int:
    """Return the smaller micro-batch size that avoids fillers and makes ranks compute the fewest rows; 0 if the configured size
    avoids them already, or no smaller size does."""
    if config.trainer.micro_batch_size is Automatic.auto:
        return 0  # the measurement sees to it

    def mostly_counts(size: int) -> bool:
        computed, idle = shares(config, ranks, size)
        return idle < IDLE * computed

    rows = config.trainer.rows
    if mostly_counts(rows):
        return 0
    smaller = [size for size in range(rows - 1, 0, -1) if mostly_counts(size)]
    return min(smaller, key=lambda size: (size * shares(config, ranks, size)[0], -size), default=0)


def fillers(config: RunConfig, ranks: int) -> Iterator[str]:
    """Yield a warning if ranks compute filler micro-batches, because those of a step cannot be divided equally."""
    if config.trainer.micro_batch_size is Automatic.auto:
        return
    of_step, rows = config.trainer.global_batch_size, config.trainer.rows
    computed, idle = shares(config, ranks, rows)
    if idle < IDLE * computed:
        return
    best = rows_without_fillers(config, ranks)
    fix = f"trainer.micro_batch_size={best}" if best else f"trainer.global_batch_size={computed * rows}"
    yield (
        f"{idle} of the {computed} micro-batches that ranks compute in a step count for nothing: trainer.global_batch_size="
        f"{of_step} in pieces of {rows} row{'s' * (rows != 1)} does not divide over them ({fix} does)"
    )
