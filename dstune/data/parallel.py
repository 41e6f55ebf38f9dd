"""A function over batches of rows in as many processes as it pays for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow as pa

MIN_ROWS_FOR_PROCESSES = 2000
"""Starting processes takes a second or two, in which one process tokenizes about this many rows."""

MIN_ROWS_PER_PROCESS = 500

ROWS_PER_BATCH = 100


def map_rows(
    rows: datasets.Dataset,
    function: Callable[[dict[str, list]], pa.Table],
    features: datasets.Features,
    target: Path,
    *,
    workers: int,
) -> datasets.Dataset:
    """What `function` gives for batches of `rows`, in order, memory-mapped from `target` (several files beside it where
    several processes ran); the columns of `rows` are not kept.

    workers: processes; 0 is one per core that this process may use.
    """
    processes = _processes(len(rows), workers)
    with _tokenizer_threads(enabled=processes == 1):
        return rows.map(
            function,
            batched=True,
            batch_size=ROWS_PER_BATCH,
            remove_columns=rows.column_names,
            features=features,
            num_proc=processes if processes > 1 else None,
            cache_file_name=str(target),
            load_from_cache_file=False,
            # datasets would pickle the function to name its own cache, which is not used here.
            new_fingerprint=target.name,
        )


def _processes(rows: int, workers: int) -> int:
    if rows < MIN_ROWS_FOR_PROCESSES:
        return 1
    return max(1, min(workers or len(os.sched_getaffinity(0)), rows // MIN_ROWS_PER_PROCESS))


@contextmanager
def _tokenizer_threads(*, enabled: bool) -> Iterator[None]:
    """Threads inside the tokenizer, or processes around it, but not both: they would fight for the same cores (and
    a process forked after the threads started would wait for them for ever)."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true" if enabled else "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
