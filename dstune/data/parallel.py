"""Map a function over batches of rows, in as many processes as pay off."""

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
"""Number of rows passed to the function at once: their texts, lists of tokens and other objects are in memory together."""

ROWS_PER_BATCH = 4000
BYTES_PER_BATCH = 2**20
"""A batch of the written file has this many rows, or about this many bytes if those are fewer rows. Each process that opens the
file needs 6 kB for each batch (of 9 columns), and four do at the end: with batches of 100 rows, that was 190 bytes a row."""

PROGRESS_SECONDS = 1.0
"""Interval of the progress reports; shorter work reports nothing."""

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
    """Map `function` over batches of `rows`, in order, and return the result, memory-mapped from `target`.

    With several processes, several files are written next to `target`. The columns of `rows` are not kept.
    workers: number of processes; 0: one per core that this process may use. doing: the work's name in progress reports.
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
            # Otherwise datasets pickles the function to name its own cache, which is not used here.
            new_fingerprint=target.name,
        )


def _processes(rows: int, workers: int) -> int:
    if rows < MIN_ROWS_FOR_PROCESSES:
        return 1
    return max(1, min(workers or len(os.sched_getaffinity(0)), rows // MIN_ROWS_PER_PROCESS))


def _rows_per_batch(rows: datasets.Dataset) -> int:
    # The batch with the longest rows decides, not the average: long rows often come together, as those of one source.
    bytes_per_row = max((batch.nbytes / len(batch) for batch in rows.data.to_batches() if len(batch)), default=1)
    return max(ROWS_AT_ONCE, min(ROWS_PER_BATCH, int(BYTES_PER_BATCH / bytes_per_row)))


@contextmanager
def _tokenizer_threads(*, enabled: bool) -> Iterator[None]:
    """Let the tokenizer use threads (`enabled`) or not, within the block.

    With several processes it must not: they would compete for the same cores, and a process forked after the threads started
    would wait for them forever.
    """
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
    """Make the garbage collector ignore the existing objects within the block.

    A full collection in a forked process would write to all of them, and so copy the pages that it shares with this process
    (120 MiB a process, after about 100,000 rows).
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _use_one_thread() -> None:
    """Let torch compute in this thread only: a forked process that scales an image would wait forever for threads that OpenMP
    started before the fork."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


class _Tallied:
    """Applies `function` to a batch, ROWS_AT_ONCE rows at a time, and appends a byte to a file each time.

    The file's size counts the work of all processes without a lock.
    """

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
    """Log the number of finished rows every PROGRESS_SECONDS within the block."""
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
