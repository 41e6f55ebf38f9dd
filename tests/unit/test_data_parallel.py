"""What many rows cost: batches of the written files, and what processes share."""

from __future__ import annotations

import gc
import json

import datasets
import numpy as np
import pyarrow as pa
import torch
from unit.data_helpers import byte_tokenizer, chats, data_run, prepared, write_jsonl

from dstune.config.data_schema import SplitConfig
from dstune.data import parallel, write

ROWS = 2 * parallel.MIN_ROWS_FOR_PROCESSES
NUMBER = datasets.Features({"number": datasets.Value("int64")})


def frozen(batch: dict[str, list]) -> pa.Table:
    """How many objects the garbage collector passes over, for each row."""
    assert len(batch["row"]) <= parallel.ROWS_AT_ONCE
    return pa.table({"number": [gc.get_freeze_count()] * len(batch["row"])})


def test_processes_share_the_objects_that_they_were_forked_with(tmp_path):
    rows = datasets.Dataset.from_dict({"row": ["a"] * ROWS})
    mapped = parallel.map_rows(rows, frozen, NUMBER, tmp_path / "rows.arrow", workers=2, doing="counting")
    assert len(mapped) == ROWS
    assert min(mapped["number"]) > 10_000
    assert gc.get_freeze_count() == 0
    assert len(mapped.data.to_batches()) == 2, "one of each process"


def test_batches_are_small_where_rows_are_long(tmp_path):
    texts = ["a"] * 600 + ["a" * 5000] * 600
    batches = [pa.table({"row": texts[start : start + 600]}) for start in (0, 600)]
    rows = datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(batches)))
    mapped = parallel.map_rows(rows, frozen, NUMBER, tmp_path / "rows.arrow", workers=1, doing="counting")
    assert len(mapped) == 1200
    assert {len(batch) for batch in mapped.data.to_batches()[:-1]} == {2**20 // 5004}


def test_places_are_written_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "ROWS_AT_ONCE", 7)
    path = write_jsonl(tmp_path / "rows.jsonl", chats(200))
    data = prepared(data_run(path, split=SplitConfig(validation=0.1)), byte_tokenizer(), tmp_path / "cache")
    assert data.validation is not None
    assert data.validation.places is not None
    places = json.loads(data.validation.places.read_text())
    assert len(places) == len(data.validation.table) > 2 * 7
    assert len(set(places)) == len(places)
    assert data.validation.places.read_text() == json.dumps(places)
    assert np.array_equal(data.validation.origins, np.arange(len(places)))


def threads(batch: dict[str, list]) -> pa.Table:
    """How many threads torch computes in, for each row."""
    return pa.table({"number": [torch.get_num_threads()] * len(batch["row"])})


def test_a_forked_process_computes_in_one_thread(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows = datasets.Dataset.from_dict({"row": ["a"] * ROWS})
        several = parallel.map_rows(rows, threads, NUMBER, tmp_path / "several.arrow", workers=2, doing="counting")
        alone = parallel.map_rows(rows, threads, NUMBER, tmp_path / "alone.arrow", workers=1, doing="counting")
        assert set(several["number"]) == {1}
        assert set(alone["number"]) == {2} == {torch.get_num_threads()}
    finally:
        torch.set_num_threads(before)
