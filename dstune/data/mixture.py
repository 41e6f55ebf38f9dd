"""Merge several sources, each with its own format and limit of rows, into one table of training rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dstune.config.forgetting import mixes_in
from dstune.config.schema import RunConfig
from dstune.data.files import DataFile
from dstune.data.formats import shape_of_all
from dstune.data.ingest import ROW_SCHEMA, Table, load_table
from dstune.data.split import lowest


def merge(tables: Mapping[str, Table], config: RunConfig, target: Path) -> Table:
    """Write the rows of all sources into one table at `target`, and return it. tables: by name, in the order of `data.mixture`.

    Each source keeps at most its `max_rows` rows. Rows get new numbers.
    """
    numbers: list[np.ndarray] = []
    files: list[DataFile] = []
    first_row = 0
    with pa.OSFile(str(target), "wb") as stream, pa.ipc.new_stream(stream, ROW_SCHEMA) as writer:
        for number, (name, table) in enumerate(tables.items()):
            is_kept = capped(table.hashes, config.data.mixture[name].max_rows)
            start = 0
            for batch in table.data.data.table.to_batches():
                mask = is_kept[start : start + len(batch)]
                start += len(batch)
                chosen = batch.filter(pa.array(mask))
                columns = {field.name: chosen[field.name] for field in ROW_SCHEMA}
                columns["number"] = pa.array(np.arange(first_row, first_row + len(chosen)), pa.int64())
                columns["file"] = pa.array(columns["file"].to_numpy() + len(files), pa.int32())
                writer.write_batch(pa.record_batch(columns, schema=ROW_SCHEMA))
                first_row += len(chosen)
            files += table.files
            numbers.append(np.full(int(is_kept.sum()), number, dtype=np.int16))
    fmt = shape_of_all({table.format for table in tables.values()}, config.task)
    rows_read = sum(table.rows_read for table in tables.values())
    bad_rows = sum(table.bad_rows for table in tables.values())
    merged = load_table(target, files, config, fmt, rows_read, bad_rows)
    return replace(merged, sources=np.concatenate(numbers))


def source_weights(config: RunConfig, rows: Sequence[int]) -> list[float]:
    """Return how often an epoch repeats the rows of each source of `data.mixture`. rows: the number of rows of each source.

    With `forgetting.replay`, the task's rows come once, and the general rows make up the configured share of the epoch.
    """
    if not mixes_in(config):
        return [source.weight for source in config.data.mixture.values()]
    task_rows, general_rows = rows
    share = config.forgetting.replay
    return [1.0, max(1e-6, round(share / (1 - share) * task_rows / max(1, general_rows), 6))]


def add_shares(counted: dict[str, dict[str, Any]], config: RunConfig) -> None:
    """Add to each source's report its weight and its share of an epoch's targets, from 0 to 1."""
    weights = dict(
        zip(counted, source_weights(config, [counts["samples"] for counts in counted.values()]), strict=True)
    )
    targets = {name: counts["targets"] * weights[name] for name, counts in counted.items()}
    total = sum(targets.values())
    for name, counts in counted.items():
        counts |= {"weight": weights[name], "target_share": round(targets[name] / total, 6)}


def capped(hashes: np.ndarray, max_rows: int | None) -> np.ndarray:
    """Return which rows of a source are used: bool [rows].

    Rows are chosen by a second hash of their hash. The split holds out the rows with the lowest hashes; if the same hash chose
    the rows here, all of them could be held out.
    """
    is_kept = np.ones(len(hashes), dtype=bool)
    if max_rows is not None and max_rows < len(hashes):
        is_kept[:] = False
        is_kept[lowest(_mixed(hashes), max_rows)] = True
    return is_kept


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """Apply the finalizer of SplitMix64 (Steele, Lea and Flood 2014), a permutation of the 64-bit numbers: uint64 [rows]."""
    mixed = hashes.copy()
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
