"""Tokenize rows with `datasets.map` and write the samples, their lengths and weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from dstune.data import statistics
from dstune.data.bad_rows import BadRows
from dstune.data.chat import evidence
from dstune.data.ingest import Table
from dstune.data.parallel import map_rows
from dstune.data.prepared import TOKENS
from dstune.data.tokenize import COUNTED, RowTokenizer

ROWS_AT_ONCE = 1000


@dataclass
class Counts:
    """Counts of the rows of one part and of their samples."""

    samples: int = 0
    truncated: int = 0
    """Rows longer than `data.max_length`, which were cut, or for causal_lm divided."""
    dropped: int = 0
    """Rows left out because `data.max_length` cut off all their targets."""
    bad_rows: int = 0
    """Rows in which tokenization found a fault."""
    tokens: int = 0
    targets: int = 0
    by_source: list[dict[str, int]] = field(default_factory=list)
    """Samples, tokens and targets of each source of a mixture."""
    shortest: int = 0
    """Tokens of the shortest row before it was cut."""
    longest: int = 0
    conversations: int = 0
    """Rows with samples that a chat template rendered; a row becomes several samples if the template rewrites the history."""
    tokens_once: int = 0
    """Tokens if each conversation were one sample: those of its longest sample."""
    lengths: dict[int, int] = field(default_factory=dict)
    """Rows by their length before it was cut (`statistics.histogram`)."""


def write_samples(
    table: Table,
    indices: np.ndarray,
    encode: RowTokenizer,
    folder: Path,
    part: str,
    bad: BadRows,
    *,
    work: Path,
    workers: int,
    with_texts: bool = False,
) -> Counts:
    """Tokenize the rows `indices` of `table` and write the samples to `folder`.

    - `PART.arrow`, `PART.lengths.npy`, `PART.weights.npy`, and `PART.content`: a digest of the samples in order
    - for a mixture `PART.sources.npy`
    - for all parts but train `PART.origins.npy` (the row that each sample comes from) and `PART.places.json` (FILE:LINE of each
      row)
    - with `with_texts` `PART.texts.arrow`: the rows
    - for conversations of train `evidence.FILE`: rows to prove before the first step

    work: folder for temporary files. workers: number of processes that tokenize; 0: one per core that this process may use.
    """
    chosen = _selected(table, indices, work / f"{part}.indices.arrow").select_columns(["row", "number", "slices"])
    mapped = map_rows(
        chosen,
        encode,
        encode.features,
        work / f"{part}.samples.arrow",
        workers=workers,
        doing=f"tokenizing {part} rows",
    )
    counts, numbers, truncated = _keep_good(mapped, encode, table, folder / part, bad)
    if encode.has_conversations and len(numbers):
        sizes = np.load(folder / f"{part}.lengths.npy")
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        counts.conversations = len(starts)
        counts.tokens_once = int(np.maximum.reduceat(sizes, starts).sum())
    if part == "train" and encode.has_conversations:
        evidence.keep(chosen, numbers, truncated, encode, folder / evidence.FILE)
    if part != "train":
        order = np.argsort(indices)
        places = order[np.searchsorted(indices, numbers, sorter=order)]
        np.save(folder / f"{part}.origins.npy", places.astype(np.int32))
        _write_places(table, indices, folder / f"{part}.places.json")
    if with_texts:
        _write_texts(chosen, folder / f"{part}.texts.arrow")
    return counts


def _selected(table: Table, indices: np.ndarray, file: Path) -> datasets.Dataset:
    """Return the rows `indices` of `table`. Unless they are consecutive, their indices are memory-mapped from `file`.

    `Dataset.select` would make a Python object of each index, and give every process that tokenizes its own copy.
    """
    start = int(indices[0]) if len(indices) else 0
    if np.array_equal(indices, np.arange(start, start + len(indices))):
        return table.data.select(range(start, start + len(indices)))
    batch = pa.record_batch([pa.array(indices, pa.uint64())], names=["indices"])
    with pa.OSFile(str(file), "wb") as stream, pa.ipc.new_stream(stream, batch.schema) as writer:
        writer.write_batch(batch)
    order = datasets.table.MemoryMappedTable.from_file(str(file))
    return datasets.Dataset(table.data.data, table.data.info, indices_table=order)


def _write_places(table: Table, indices: np.ndarray, target: Path) -> None:
    with target.open("w") as stream:
        stream.write("[")
        for start in range(0, len(indices), ROWS_AT_ONCE):
            places = json.dumps(table.places(indices[start : start + ROWS_AT_ONCE]))
            stream.write((", " if start else "") + places[1:-1])
        stream.write("]")


def _write_texts(rows: datasets.Dataset, target: Path) -> None:
    schema = pa.schema([("row", pa.large_string()), ("slices", pa.string())])
    with pa.OSFile(str(target), "wb") as stream, pa.ipc.new_stream(stream, schema) as writer:
        for batch in rows.iter(batch_size=ROWS_AT_ONCE):
            columns = [pa.array(batch[field.name], field.type) for field in schema]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def _keep_good(
    mapped: datasets.Dataset, encode: RowTokenizer, table: Table, target: Path, bad: BadRows
) -> tuple[Counts, np.ndarray, np.ndarray]:
    """Copy the samples that have targets to files at `target`, without the columns that only served to count.

    Returns the counts, the row number of each sample, and the sorted numbers of the rows that were cut, both int64. Rows in
    which tokenization found a fault are added to `bad`.
    """
    counts = Counts()
    written = mapped.data.table.schema if len(mapped) else encode.features.arrow_schema
    schema = pa.schema([column for column in written if column.name not in COUNTED])
    content = {name: xxhash.xxh3_128() for name in schema.names}
    absent = set(encode.later_columns)
    # There may be very many rows, so nothing here takes more than 14 bytes for each.
    last_number = -1
    lengths, weights, sources, numbers = ([np.empty(0, dtype)] for dtype in (np.int32, np.int64, np.int16, np.int64))
    truncated = [np.empty(0, np.int64)]
    with pa.OSFile(f"{target}.arrow", "wb") as stream, pa.ipc.new_stream(stream, schema) as writer:
        for batch in mapped.data.table.to_batches() if len(mapped) else []:
            faulty = pc.not_equal(batch["problem"], "").to_numpy(zero_copy_only=False)
            for position in np.flatnonzero(faulty):
                bad.add(table.place(batch["number"][position].as_py()), batch["problem"][position].as_py())
            weight = batch["weight"].to_numpy()
            number = batch["number"].to_numpy()
            empty = ~faulty & (weight == 0)
            good = ~faulty & ~empty
            cut = batch["truncated"].to_numpy(zero_copy_only=False) & ~faulty
            counts.bad_rows += int(faulty.sum())
            counts.dropped += int(empty.sum())
            # A document may be several consecutive samples; it counts once.
            first = np.diff(number, prepend=last_number) != 0
            last_number = number[-1] if len(number) else last_number
            truncated.append(number[cut])
            counts.truncated += int((cut & first).sum())
            good_batch = batch.select(schema.names).filter(pa.array(good))
            writer.write_batch(good_batch)
            for name, digest in content.items():
                digest.update(_bytes_of(good_batch[name]))
            absent = {name for name in absent if not len(pc.list_flatten(good_batch[name]))}
            parts = [
                pc.list_value_length(good_batch[name]).to_numpy() for name in schema.names if name.endswith(TOKENS)
            ]
            lengths.append(np.sum(parts, axis=0).astype(np.int32))
            weights.append(weight[good])
            numbers.append(number[good])
            if table.sources is not None:
                sources.append(table.sources[number[good]])
            row_lengths = batch["length"].to_numpy()[~faulty & first]
            counts.lengths = statistics.merged([counts.lengths, statistics.histogram(row_lengths)])
            if len(row_lengths):
                shortest = int(row_lengths.min())
                counts.shortest = min(counts.shortest, shortest) if counts.longest else shortest
                counts.longest = max(counts.longest, int(row_lengths.max()))
    all_lengths, all_weights = np.concatenate(lengths), np.concatenate(weights)
    np.save(f"{target}.lengths.npy", all_lengths)
    np.save(f"{target}.weights.npy", all_weights)
    digests = {name: digest.hexdigest() for name, digest in content.items() if name not in absent}
    Path(f"{target}.content").write_text(" ".join(f"{name}={digest}" for name, digest in digests.items()))
    counts.samples, counts.tokens, counts.targets = len(all_lengths), int(all_lengths.sum()), int(all_weights.sum())
    if table.sources is not None:
        all_sources = np.concatenate(sources)
        np.save(f"{target}.sources.npy", all_sources)
        counts.by_source = [
            {
                "samples": len(sample_numbers),
                "tokens": int(all_lengths[sample_numbers].sum()),
                "targets": int(all_weights[sample_numbers].sum()),
            }
            for sample_numbers in (
                np.flatnonzero(all_sources == number) for number in range(int(table.sources.max()) + 1)
            )
        ]
    return counts, np.concatenate(numbers), np.unique(np.concatenate(truncated))


def _bytes_of(column: pa.Array) -> bytes:
    """Return the values of a column, one after the other, however they are spread over batches and buffers; how those of a list
    belong to rows is in the lengths."""
    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = column.flatten()
    values = column.to_numpy(zero_copy_only=False)
    if values.dtype != object:
        return bytes(values.tobytes())
    # Each text ends with a byte that UTF-8 never has.
    return b"".join(
        b"\xfe\xff" if value is None else str(value).encode("utf-8", "surrogatepass") + b"\xff" for value in values
    )
