"""Addresses of tables, and rows in the order of their content: without any table."""

from __future__ import annotations

import random
from datetime import date
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dstune.core.errors import UserError
from dstune.data import sources
from dstune.lakehouse import ordered
from dstune.lakehouse.address import Address, parse
from dstune.lakehouse.ordered import write_ordered


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("delta:///data/t", Address("delta", "/data/t")),
        ("delta://data/t@7", Address("delta", "data/t", 7)),
        ("delta:///a@b/t@7#0f0f0f0f-1", Address("delta", "/a@b/t", 7, "", "0f0f0f0f-1")),
        ("uc://a.b.c@2026-03-04T05:06:07Z", Address("uc", "a.b.c", None, "2026-03-04T05:06:07Z")),
        ("uc://a.b.c?columns=x, y", Address("uc", "a.b.c", columns=("x", "y"))),
        ("delta:///t@1?where=a = 'x?@#&y' AND b > 1", Address("delta", "/t", 1, where="a = 'x?@#&y' AND b > 1")),
        ("delta:///t?columns=a&where=b", Address("delta", "/t", columns=("a",), where="b")),
        ("delta://s3://bucket/t@3", Address("delta", "s3://bucket/t", 3)),
    ],
)
def test_addresses(spec, expected):
    assert parse(spec, "data.train") == expected
    assert parse(str(expected), "data.train") == expected


@pytest.mark.parametrize("spec", ["delta://", "delta:///t?limit=3", "delta:///t@2026-99-01"])
def test_addresses_that_are_none(spec):
    with pytest.raises(UserError, match=r"data\.train"):
        parse(spec, "data.train")


def rows_of(count: int) -> list[dict]:
    random.seed(0)
    return [{"text": f"row {number % 900} " + "x" * random.randrange(50), "n": number % 900} for number in range(count)]


def batches_of(rows: list[dict], size: int) -> list[pa.RecordBatch]:
    return [pa.RecordBatch.from_pylist(rows[at : at + size]) for at in range(0, len(rows), size)]


def test_the_order_and_the_digest_are_those_of_the_rows_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(ordered, "PIECE_BYTES", 20_000)  # several pieces
    rows = rows_of(3000)
    found = []
    for name, shuffled, size, bytes_ in (("a", False, 100, 1), ("b", True, 77, 2**28), ("c", True, 3000, 2**30)):
        if shuffled:
            random.shuffle(rows)
        (tmp_path / f"{name}-pieces").mkdir()
        out = tmp_path / f"{name}.parquet"
        written = write_ordered(batches_of(rows, size), out, tmp_path / f"{name}-pieces", bytes_)
        assert written.rows == 3000
        found.append((written.digest, pq.read_table(out).to_pylist()))
    assert found[0] == found[1] == found[2]
    assert sorted(map(str, found[0][1])) == sorted(map(str, rows))
    assert found[0][1] != rows


def test_many_equal_rows_are_written_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(ordered, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(ordered, "MAX_RANGE_BYTES", 10_000)
    rows = [*rows_of(500), *[{"text": "the same " * 10, "n": 1}] * 2000]
    random.shuffle(rows)
    written = []
    write = pq.ParquetWriter.write_table
    monkeypatch.setattr(
        pq.ParquetWriter,
        "write_table",
        lambda self, table, **more: written.append(table.nbytes) or write(self, table, **more),
    )
    (tmp_path / "pieces").mkdir()
    result = write_ordered(batches_of(rows, 100), tmp_path / "parts.parquet", tmp_path / "pieces", 2**28)
    assert max(written) < 20_000 < sum(written)
    assert result.rows == 2500
    monkeypatch.setattr(ordered, "MAX_RANGE_BYTES", 2**30)
    (tmp_path / "whole").mkdir()
    whole = write_ordered(batches_of(rows, 100), tmp_path / "whole.parquet", tmp_path / "whole", 2**28)
    assert whole == result
    assert max(written) > 100_000
    assert pq.read_table(tmp_path / "parts.parquet").equals(pq.read_table(tmp_path / "whole.parquet"))


def test_a_row_more_or_less_is_another_digest(tmp_path):
    digests = set()
    for number, rows in enumerate((rows_of(100), rows_of(99), [*rows_of(99), {"text": "other", "n": 1}])):
        (tmp_path / str(number)).mkdir()
        digests.add(
            write_ordered(batches_of(rows, 50), tmp_path / f"{number}.parquet", tmp_path / str(number), 1).digest
        )
    assert len(digests) == 3


def test_a_column_that_is_added_moves_no_row():
    assert ordered.row_key({"a": 1}) == ordered.row_key({"b": None, "a": 1})
    assert ordered.row_key({"a": 1}) != ordered.row_key({"a": "1"}) != ordered.row_key({"a": 1.0})
    odd = {"d": date(2026, 1, 2), "e": Decimal("1.50"), "f": b"\xff", "g": [{"h": None}], "i": float("nan")}
    assert len(ordered.row_key(odd)) == 16


def test_views_and_dictionaries_become_plain_columns(tmp_path):
    table = pa.table(
        {
            "view": pa.array(["a", "b"]).cast(pa.string_view()),
            "kind": pa.array(["x", "x"]).dictionary_encode(),
            "list": pa.array([["p"], None]),
            "list view": pa.array([["p", "q"], ["r"]], pa.list_view(pa.string())),
        }
    )
    (tmp_path / "pieces").mkdir()
    write_ordered(table.to_batches(), tmp_path / "rows.parquet", tmp_path / "pieces", 1)
    rows = sorted(pq.read_table(tmp_path / "rows.parquet").to_pylist(), key=lambda row: row["view"])
    assert rows == [
        {"view": "a", "kind": "x", "list": ["p"], "list view": ["p", "q"]},
        {"view": "b", "kind": "x", "list": None, "list view": ["r"]},
    ]


def test_addresses_of_other_schemes_and_unresolved_ones_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"and delta://, uc:// are read"):
        sources.expand("s3://bucket/rows.jsonl", "data.train")
    with pytest.raises(UserError, match="not resolved"):
        sources.expand("delta:///t", "data.train")
    with pytest.raises(UserError, match="not on this machine"):
        sources.expand("delta:///t@1#0f0f0f0f", "data.train")
