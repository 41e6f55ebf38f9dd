"""A function over batches of rows in as many processes as it pays for."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow as pa

MIN_ROWS_FOR_PROCESSES = 2000
"""Starting processes takes a second or two, in which one process tokenizes about this many rows."""

MIN_ROWS_PER_PROCESS = 500

ROWS_AT_ONCE = 100
"""What the function is given: texts, lists of tokens and the objects around them are in memory for as many rows."""

ROWS_PER_BATCH = 4000
BYTES_PER_BATCH = 2**20
"""A batch of the written file is as many rows, or about as many bytes of them where that is fewer. Each process that opens the
file holds 6 kB for each batch (of 9 columns), and four do when the last rows are done: batches of 100 rows took 190 bytes a row."""

PROGRESS_SECONDS = 1.0
"""How often the number of rows that are done is reported; what takes less is not worth a line."""

log = logging.getLogger(__name__)


def map_rows(
    rows: datasets.Dataset,
    function: Callable[[dict[str, list]], pa.Table],
    features: datasets.Features,
    target: Path,
    *,
    workers: int,
    doing: str,
) -> datasets.Dataset:
    """Map `function` over batches of `rows`, in order, memory-mapped from `target` (several files beside it where several processes
    ran); the columns of `rows` are not kept.

    workers: processes; 0 is one per core that this process may use. doing: what it is, for those who wait.
    """
    processes = _processes(len(rows), workers)
    batch = _rows_per_batch(rows)
    tally = target.with_name(f"{target.name}.batches")
    with _tokenizer_threads(enabled=processes == 1), _objects_left_alone(), _progress_reports(doing, tally, len(rows)):
        return rows.map(
            _Tallied(function, tally),
            batched=True,
            batch_size=batch,
            writer_batch_size=batch,
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


def _rows_per_batch(rows: datasets.Dataset) -> int:
    # Where rows are longest, not on the whole: long ones often lie together, as those of a source do.
    bytes_per_row = max((batch.nbytes / len(batch) for batch in rows.data.to_batches() if len(batch)), default=1)
    return max(ROWS_AT_ONCE, min(ROWS_PER_BATCH, int(BYTES_PER_BATCH / bytes_per_row)))


@contextmanager
def _tokenizer_threads(*, enabled: bool) -> Iterator[None]:
    """Let either threads work inside the tokenizer, or processes around it, but not both: they would fight for the same cores
    (and a process forked after the threads started would wait for them for ever)."""
    name = "TOKENIZERS_PARALLELISM"
    value_before = os.environ.get(name)
    os.environ[name] = "true" if enabled else "false"
    try:
        yield
    finally:
        if value_before is None:
            del os.environ[name]
        else:
            os.environ[name] = value_before


@contextmanager
def _objects_left_alone() -> Iterator[None]:
    """Let the garbage collector pass over the objects that there are: a full collection in a forked process would write to all
    of them, and so copy the pages that it shares with this one (120 MiB a process, after some 100,000 rows)."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _use_one_thread() -> None:
    """Let torch compute in this thread alone: a forked process would wait for ever for threads that OpenMP started before the
    fork, as soon as an image is scaled."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


class _Tallied:
    """`function` over a batch, ROWS_AT_ONCE rows at a time, for each of which it leaves a byte in a file: a count over
    processes that needs no lock."""

    def __init__(self, function: Callable[[dict[str, list]], pa.Table], tally: Path):
        self._function = function
        self._tally = tally
        self._creator = os.getpid()

    def __call__(self, batch: dict[str, list]) -> pa.Table:
        if os.getpid() != self._creator:
            _use_one_thread()
        count = len(next(iter(batch.values())))
        return pa.concat_tables([self._part(batch, start) for start in range(0, count, ROWS_AT_ONCE)])

    def _part(self, batch: dict[str, list], start: int) -> pa.Table:
        result = self._function({name: values[start : start + ROWS_AT_ONCE] for name, values in batch.items()})
        with self._tally.open("ab") as file:
            file.write(b".")
        return result


@contextmanager
def _progress_reports(doing: str, tally: Path, rows: int) -> Iterator[None]:
    """Log every PROGRESS_SECONDS, within the block, how many of the rows are done."""
    finished = threading.Event()
    tally.touch()

    def report_progress() -> None:
        while not finished.wait(PROGRESS_SECONDS):
            done = min(tally.stat().st_size * ROWS_AT_ONCE, rows)
            log.info(doing, extra={"done": done, "total": rows})

    reporter = threading.Thread(target=report_progress, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        finished.set()
        reporter.join()
        tally.unlink()
