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
    groups = ranks // parallelism_of(config.parallel).size
    needed = ceil(config.trainer.global_batch_size / rows)
    computed = groups * ceil(needed / groups)
    return computed, computed - needed


def fillers(config: RunConfig, ranks: int) -> Iterator[str]:
    """Yield a warning if ranks compute filler micro-batches, because those of a step cannot be divided equally."""
    if config.trainer.micro_batch_size is Automatic.auto:
        return  # the measurement sees to it
    of_step, rows = config.trainer.global_batch_size, config.trainer.rows

    def shared(size: int) -> tuple[int, int]:
        return shares(config, ranks, size)

    computed, idle = shared(rows)
    if idle < IDLE * computed:
        return
    smaller = [size for size in range(rows - 1, 0, -1) if shared(size)[1] < IDLE * shared(size)[0]]
    best = min(smaller, key=lambda size: (size * shared(size)[0], -size), default=0)  # of the fewest rows for a rank
    fix = f"trainer.micro_batch_size={best}" if best else f"trainer.global_batch_size={computed * rows}"
    yield (
        f"{idle} of the {computed} micro-batches that ranks compute in a step count for nothing: trainer.global_batch_size="
        f"{of_step} in pieces of {rows} row{'s' * (rows != 1)} does not divide over them ({fix} does)"
    )
