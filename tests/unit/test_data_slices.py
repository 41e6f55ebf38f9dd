"""Slices of splits: the rows that `datasets` would take, of files, folders and the hub."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ReadInstruction
from unit.data_helpers import data_run, write_jsonl

from dstune import samples
from dstune.core.errors import UserError
from dstune.data import slices, sources
from dstune.data.hub import HubName, hub_name

NAME = "data.train"


def read(spec: str, **more) -> list[str]:
    return [row.fields["text"] for file in sources.expand(spec, NAME, **more) for row in sources.read(file)]


def texts(name: str, count: int) -> list[dict[str, str]]:
    return [{"text": f"{name}{number}"} for number in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty training rows in two files, and five of the test."""
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", texts("a", 10))
    write_jsonl(tmp_path / "train-00001-of-00002.jsonl", texts("b", 10))
    write_jsonl(tmp_path / "test.jsonl", texts("t", 5))
    return tmp_path


def test_bounds_are_those_of_datasets():
    generator = random.Random(0)
    for _ in range(2000):
        count, percent = generator.randint(1, 400), generator.random() < 0.5
        bounds = [
            "" if generator.random() < 0.2 else f"{generator.randint(-100, 100)}{'%' * percent}" for _ in range(2)
        ]
        text = f"train[{bounds[0]}:{bounds[1]}]"
        (chosen,) = slices.parse(text, NAME, text)
        (expected,) = ReadInstruction.from_spec(text).to_absolute({"train": count})
        first, last = chosen.bounds(count)
        assert list(range(first, last)) == list(range(expected.from_, expected.to)), (text, count)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[8:12]", ["a8", "a9", "b0", "b1"]),
        ("train[:10%]+test[-40%:]", ["a0", "a1", "t3", "t4"]),
        ("[18:]", ["b8", "b9"]),
        ("test+train[:1]", ["t0", "t1", "t2", "t3", "t4", "a0"]),
        ("train[10:11]+train[10:11]", ["b0", "b0"]),
    ],
)
def test_slices_of_a_folder(folder, split, expected):
    assert read(f"{folder}:{split}") == expected


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "arrow", "txt"])
def test_slices_of_every_kind_of_file(tmp_path, ending):
    rows, path = texts("r", 10), tmp_path / f"rows.{ending}"
    table = pa.Table.from_pylist(rows)
    if ending == "parquet":
        pq.write_table(table, path, row_group_size=3)
    elif ending == "arrow":
        with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    elif ending == "json":
        path.write_text(json.dumps(rows))
    else:
        lines = [json.dumps(row) if ending == "jsonl" else row["text"] for row in rows]
        path.write_text("\n".join([*(["text"] if ending == "csv" else []), *lines]))
    assert read(f"{path}:[2:5]") == ["r2", "r3", "r4"]
    assert read(f"{path}:[-20%:]") == ["r8", "r9"]
    assert read(f"{tmp_path}/row*.{ending}:[:1]") == ["r0"]
    (file,) = sources.expand(f"{path}:[2:5]", NAME)
    assert [row.fields["text"] for row in sources.read(file, skip=2)] == ["r4"]
    assert sources.fingerprint(file) != sources.fingerprint(sources.expand(str(path), NAME)[0])


def test_parts_of_one_split_are_trained_and_validated(folder):
    train, held_out = f"{folder}:train[:80%]", f"{folder}:train[80%:]"
    config = data_run(train, validation=held_out).data
    parts = [
        [row.fields["text"] for file in sources.of_part(config, part) for row in sources.read(file)]
        for part in ("train", "validation")
    ]
    assert [len(part) for part in parts] == [16, 4] and not {*parts[0]} & {*parts[1]}


@pytest.mark.parametrize(
    ("split", "reason"),
    [
        pytest.param(f"train[:{'9' * 5000}]", "is no slice of a split", id="digits"),
        ("train[:101%]", r"'train\[:101%\]' is no slice of a split"),
        ("train[10%:200]", "is no slice of a split"),
        ("train[20%]", "is no slice of a split"),
        ("train[7:7]", "the slice holds none of the 20 rows"),
        ("train[50:60]", "the slice holds none of the 20 rows"),
        ("trian[:5]", "there is no split 'trian'"),
    ],
)
def test_what_is_no_slice(folder, split, reason):
    with pytest.raises(UserError, match=reason):
        read(f"{folder}:{split}")


def test_a_sample_without_splits():
    with pytest.raises(UserError, match="this sample has no such split"):
        read("sample://chitchat:validation[:5]")


def test_slices_of_a_sample(monkeypatch, tmp_path):
    rows = write_jsonl(tmp_path / "data.jsonl", texts("r", 10))
    held_out = write_jsonl(tmp_path / "validation.jsonl", texts("v", 10))
    files = {"sample://chitchat": rows, "sample://attacks": rows, "sample://attacks:validation": held_out}
    monkeypatch.setattr(samples, "resolve", lambda uri, fetch: files[uri])
    assert read("sample://attacks:validation") == [f"v{number}" for number in range(10)]
    assert read("sample://attacks:validation[:2]+[:1]") == ["v0", "v1", "r0"]
    assert read("sample://chitchat:[:20%]") == ["r0", "r1"]
    assert read("sample://chitchat:[8:]+[:1]") == ["r8", "r9", "r0"]
    assert len(read("sample://chitchat")) == 10
    with pytest.raises(UserError, match="is no slice of a split"):
        read("sample://chitchat:[5]")


def test_a_stream_takes_no_slice(folder):
    with pytest.raises(UserError, match="a stream enters its files anywhere"):
        sources.of_part(data_run(f"{folder}:train[:5]", streaming=True).data, "train")
    assert len(sources.of_part(data_run(f"{folder}:train", streaming=True).data, "train")) == 2


def test_slices_of_the_hub_are_part_of_the_name():
    name = hub_name("org/name@main:train[:20%]+test[5:]")
    assert name == HubName("org/name", "main", "train[:20%]+test[5:]")
    assert str(name) == "org/name@main:train[:20%]+test[5:]"
    assert hub_name("org/name:[:5]") == HubName("org/name", None, "[:5]")
    assert hub_name("org/name:") is None
