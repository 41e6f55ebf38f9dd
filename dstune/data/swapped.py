"""Write and load samples of held-out rows with the terms of a table swapped (`evaluate.counterfactual`)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from dstune.config.data_schema import OnBadRow
from dstune.data.bad_rows import BadRows
from dstune.data.ingest import ROW_SCHEMA
from dstune.data.labels import ChosenRows
from dstune.data.prepared import Swapped, load_split
from dstune.data.swaps import Swaps
from dstune.data.tokenize import RowTokenizer
from dstune.data.write import write_samples


def write_swapped(
    rows: ChosenRows, swaps: Swaps, encode: RowTokenizer, folder: Path, part: str, *, work: Path, workers: int
) -> None:
    """Write the samples of those `rows` that contain a term, with terms swapped, as a separate part next to `part`."""
    name = _name(part)
    target = work / f"{name}.rows.arrow"
    origins: list[int] = []
    names: list[list[str]] = []
    with pa.OSFile(str(target), "wb") as stream, pa.ipc.new_stream(stream, ROW_SCHEMA) as writer:
        for place, number in enumerate(rows.indices.tolist()):
            fields = rows.table.data[number]
            row = json.loads(fields["row"])
            swapped = swaps.row(row)
            if swapped is None:
                continue
            fields |= {"row": json.dumps(swapped, ensure_ascii=False), "number": len(origins)}
            writer.write_batch(pa.RecordBatch.from_pylist([fields], schema=ROW_SCHEMA))
            origins.append(place)
            names.append(swaps.names(row))
    (folder / f"{name}.json").write_text(json.dumps({"of": origins, "names": names}))
    if not origins:
        return
    data = datasets.Dataset.from_file(str(target))
    table = replace(rows.table, data=data, sources=None)
    unusable = BadRows(OnBadRow.skip)
    write_samples(
        table, np.arange(len(origins)), encode, folder, name, unusable, work=work, workers=workers, with_texts=True
    )


def load_swapped(folder: Path, part: str) -> Swapped | None:
    """Return what `write_swapped` wrote; None if it wrote nothing, or no row contained a term."""
    file = folder / f"{_name(part)}.json"
    if not file.exists():
        return None
    record = json.loads(file.read_text())
    return Swapped(load_split(folder, _name(part)), np.array(record["of"]), record["names"]) if record["of"] else None


def _name(part: str) -> str:
    return f"{part}_swapped"
