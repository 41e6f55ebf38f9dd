"""Delta tables: read at a version, in an order of our own, and refused where they are not whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest
from support.delta_tables import mapped_table, table_with_deletions

from dstune.core.errors import UserError
from dstune.data import sources

deltalake = pytest.importorskip("deltalake", reason="pip install '.[delta]' in a clone of dstune")
pytestmark = pytest.mark.slow

SEEN: list[str] = []


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    SEEN.clear()


@pytest.fixture
def table(tmp_path):
    """Versions 0, 1 and 2 with 10, 20 and 30 rows."""
    place = tmp_path / "table"
    for version in range(3):
        rows = [
            {"text": f"row {number}", "label": "ab"[number % 2], "n": number}
            for number in range(10 * version, 10 * version + 10)
        ]
        deltalake.write_deltalake(place, pa.Table.from_pylist(rows), mode="append")
    return place


def resolve(spec: str) -> str:
    return sources.data_source_of(spec).resolve(spec, "data.train", SEEN.append)


def read(spec: str) -> list[dict]:
    files = sources.expand(resolve(spec), "data.train")
    return [row.fields for file in files for row in sources.read(file)]


def digest(spec: str) -> str:
    resolved = resolve(spec)
    return sources.data_source_of(resolved).describe(resolved)["digest"]


def numbers(rows: list[dict]) -> list[int]:
    return sorted(row["n"] for row in rows)


def test_versions_times_columns_and_predicates(table):
    resolved = resolve(f"delta://{table}")
    identity = deltalake.DeltaTable(table).metadata().id
    assert resolved == f"delta://{table}@2#{identity}"
    assert resolve(resolved) == resolved
    described = sources.data_source_of(resolved).describe(resolved)
    assert (described["version"], described["id"], described["rows"]) == (2, identity, 30)
    assert numbers(read(f"delta://{table}@1")) == list(range(20))
    assert numbers(read(f"delta://{table}?where=label = 'a' AND n > 10")) == list(range(12, 30, 2))
    assert read(f"delta://{table}@0?columns=n")[0].keys() == {"n"}
    time.sleep(1.1)
    then = datetime.now(UTC).isoformat()
    deltalake.write_deltalake(table, pa.table({"text": ["x"], "label": ["a"], "n": [99]}), mode="append")
    assert len(read(f"delta://{table}@{then}")) == 30
    assert len(read(f"delta://{table}")) == 31


@pytest.mark.parametrize(
    ("where", "leftover"),
    [
        ("n = 1 n = 2", "n = 2"),
        ("n = 1 AND label = 'b' garbage", "garbage"),
        ("n = 1; DROP TABLE x", "; DROP TABLE x"),
        ("n = 1) OR (n = 2", ") OR (n = 2"),
        ("n = 1)) ((n = 2", ")) ((n = 2"),
    ],
)
def test_what_follows_a_predicate_is_refused_with_its_position(table, where, leftover):
    assert f"position {len(where) - len(leftover) + 1}, " in refused(f"delta://{table}?where={where}")


@pytest.mark.parametrize(
    "where",
    ["text NOT IN ('x', NULL)", "NOT (text in ('x', null))", "n <> 3 AND n <> NULL", "n = /* IS */ NULL", "NULL <> n"],
)
def test_a_comparison_with_null_is_refused(table, where):
    """In SQL it is true for no row; the library returns rows."""
    assert "NULL" in refused(f"delta://{table}?where={where}")


def test_null_that_is_compared_with_nothing_is_read(table):
    assert numbers(read(f"delta://{table}?where=n < 2 AND text IS NOT NULL AND label <> 'NOT IN (NULL)'")) == [0, 1]
    assert numbers(read(f'delta://{table}?where=n < 2 AND "text" IS DISTINCT FROM NULL -- = NULL')) == [0, 1]


def test_a_predicate_is_read_to_its_end(table):
    assert "predicate" in refused(f"delta://{table}?where=n BETWEEN 1")
    assert numbers(read(f"delta://{table}?where=n BETWEEN 1 AND 2")) == [1, 2]
    assert numbers(read(f"delta://{table}?where=(n = 1) OR (n = 2) -- AND n = 1")) == [1, 2]
    assert numbers(read(f"delta://{table}?where=n = 1 OR text = 'a ) b' OR n = 2")) == [1, 2]


def test_times_are_those_of_the_files_of_commits(table):
    """And a commit that seems older than the one before it comes a millisecond after that."""
    log = sorted((table / "_delta_log").glob("*.json"))
    for file, seconds in zip(log, (1_700_000_000, 1_700_000_100, 1_700_000_050), strict=True):
        os.utime(file, (seconds, seconds))
    for moment, rows in (("2023-11-14T22:13:20Z", 10), ("2023-11-14T22:14:59Z", 10), ("2023-11-14T22:15:00Z", 20)):
        assert len(read(f"delta://{table}@{moment}")) == rows
    assert len(read(f"delta://{table}@2023-11-14T22:15:00.001Z")) == 30
    assert "begins at" in refused(f"delta://{table}@2023-11-14T22:13:19Z")


@pytest.mark.parametrize("since", [0, 1])
def test_times_in_commits_count_since_the_table_has_them(table, since):
    log = sorted((table / "_delta_log").glob("*.json"))
    for version, file in enumerate(log):
        actions = [json.loads(line) for line in file.read_text().splitlines()]
        for action in actions:
            if "metaData" in action:
                settings = {"delta.enableInCommitTimestamps": "true"}
                if since:
                    settings["delta.inCommitTimestampEnablementVersion"] = str(since)
                    settings["delta.inCommitTimestampEnablementTimestamp"] = "1700000100000"
                action["metaData"]["configuration"] = settings
            if "protocol" in action:
                action["protocol"] = {
                    "minReaderVersion": 1,
                    "minWriterVersion": 7,
                    "writerFeatures": ["inCommitTimestamp"],
                }
            if "commitInfo" in action and version >= since:
                action["commitInfo"]["inCommitTimestamp"] = 1_700_000_000_000 + 100_000 * version
        actions.sort(key=lambda action: "commitInfo" not in action)
        file.write_text("\n".join(map(json.dumps, actions)))
        seconds = 1_600_000_000 + version if version < since else time.time()  # of a copy: the files are of today
        os.utime(file, (seconds, seconds))
    assert len(read(f"delta://{table}@2023-11-14T22:14:59Z")) == 10
    assert len(read(f"delta://{table}@2023-11-14T22:15:00Z")) == 20
    assert len(read(f"delta://{table}@2024-01-01")) == 30


def test_a_field_that_a_struct_gets_moves_no_row(tmp_path):
    rows = [{"text": f"row {number}", "of": {"a": number, "parts": [{"b": number}, None]}} for number in range(50)]
    wider = [
        {"text": row["text"], "of": {**row["of"], "new": None, "parts": [{"b": row["of"]["a"], "c": None}, None]}}
        for row in rows
    ]
    of = [("a", pa.int64()), ("parts", pa.list_(pa.struct([("b", pa.int64())])))]
    wide = [
        ("a", pa.int64()),
        ("parts", pa.list_(pa.struct([("b", pa.int64()), ("c", pa.string())]))),
        ("new", pa.string()),
    ]
    for name, content, fields in (("narrow", rows, of), ("wide", wider, wide)):
        schema = pa.schema([("text", pa.string()), ("of", pa.struct(fields))])
        deltalake.write_deltalake(tmp_path / name, pa.Table.from_pylist(content, schema))
    assert digest(f"delta://{tmp_path / 'narrow'}") == digest(f"delta://{tmp_path / 'wide'}")


def test_rows_that_differ_in_what_is_absent_have_different_keys():
    from dstune.lakehouse.ordered import row_key

    different = [
        {"a": None},
        {"a": {}},
        {"a": {"b": {}}},
        {"a": [None]},
        {"a": []},
        {"a": [None, None]},
        {"a": [("k", None)]},
    ]
    assert len({row_key(row) for row in different}) == len(different)
    assert row_key({"a": {"b": None, "c": 1}}) == row_key({"a": {"c": 1}})


def test_maintenance_changes_neither_rows_nor_their_order(table):
    before, rows = digest(f"delta://{table}"), read(f"delta://{table}")
    opened = deltalake.DeltaTable(table)
    opened.optimize.compact()
    opened.optimize.z_order(["n"])
    opened.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    assert opened.version() > 2
    assert digest(f"delta://{table}") == before
    assert read(f"delta://{table}") == rows


def test_column_mapping_and_deletion_vectors(tmp_path):
    rows = [{"text": f"row {number}", "label": "ab"[number % 2]} for number in range(10)]
    by_text = sorted(rows, key=str)
    assert sorted(read(f"delta://{mapped_table(tmp_path / 'mapped', rows)}"), key=str) == by_text
    left = [row for number, row in enumerate(rows) if number not in (2, 7)]
    assert sorted(read(f"delta://{table_with_deletions(tmp_path / 'deleted', rows, [2, 7])}"), key=str) == sorted(
        left, key=str
    )


def test_partitions_and_a_changed_schema(tmp_path):
    place = tmp_path / "parts"
    first = pa.table({"text": ["a", "b c", "d"], "lang": ["de", "fr/x", None]})
    deltalake.write_deltalake(place, first, partition_by=["lang"])
    before = digest(f"delta://{place}")
    more = pa.table({"text": ["e"], "lang": ["de"], "extra": [1]})
    deltalake.write_deltalake(place, more, mode="append", schema_mode="merge")
    assert sorted(row["text"] for row in read(f"delta://{place}?where=lang = 'de'")) == ["a", "e"]
    assert {row["text"]: row["lang"] for row in read(f"delta://{place}@0")} == {"a": "de", "b c": "fr/x", "d": None}
    assert len(read(f"delta://{place}")[0]) == 3
    assert digest(f"delta://{place}@0") == before


def test_chats_and_other_nested_rows(tmp_path):
    moment = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
    rows = [
        {
            "messages": [{"role": "user", "content": f"hello {number}"}, {"role": "assistant", "content": "yes"}],
            "about": {"lang": "de", "words": ["a", "b"]},
            "at": moment,
            "day": moment.date(),
            "raw": b"\xff",
        }
        for number in range(3)
    ]
    table = pa.Table.from_pylist(rows).append_column(
        "counts", pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int64()))
    )
    deltalake.write_deltalake(tmp_path / "chats", table)
    found = sorted(read(f"delta://{tmp_path / 'chats'}"), key=lambda row: row["messages"][0]["content"])
    assert [row["messages"] for row in found] == [row["messages"] for row in rows]
    assert [row["about"] for row in found] == [row["about"] for row in rows]
    assert {row["at"] for row in found} == {moment}
    assert [row["counts"] for row in found] == [{"a": 1}, {}, None]


def refused(spec: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve(spec)
    return str(caught.value)


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_a_log_leads_to_no_file_outside_the_table(table, tmp_path, form):
    stranger = tmp_path / "stranger"
    shutil.copytree(table, stranger)
    own = next(stranger.glob("*.parquet"))
    private = own.rename(tmp_path / "private.parquet")
    for log in stranger.glob("_delta_log/*.json"):
        log.write_text(log.read_text().replace(f'"path":"{own.name}"', f'"path":"{form.format(private)}"'))
    assert "private.parquet lies outside the table's folder" in refused(f"delta://{stranger}")
    private.rename(tmp_path / own.name)
    shutil.copytree(table, tmp_path / "linked")
    (tmp_path / "linked" / own.name).unlink()
    (tmp_path / "linked" / own.name).symlink_to(tmp_path / own.name)
    assert "lies outside the table's folder" in refused(f"delta://{tmp_path / 'linked'}")


ADDRESSES = ("FILE://{}", "file:{}", " file://{}", "\tfile://{}", "..\\private.parquet", "{}?/../x", "http://[::1]/x")


@pytest.mark.parametrize("form", ADDRESSES)
def test_no_spelling_of_an_address_leads_outside(table, form):
    """The library reads them as addresses; as paths they name files in the folder, which are there and as large."""
    stranger = table.parent / "stranger"
    shutil.copytree(table, stranger)
    own = next(stranger.glob("*.parquet"))
    private = shutil.copy(own, table.parent / "private.parquet")
    name = form.format(private)
    decoy = stranger / name
    decoy.parent.mkdir(parents=True, exist_ok=True)
    own.rename(decoy)
    for log in stranger.glob("_delta_log/*.json"):
        log.write_text(log.read_text().replace(f'"path":"{own.name}"', f'"path":{json.dumps(name)}'))
    assert "lies outside the table's folder" in refused(f"delta://{stranger}")


@pytest.mark.parametrize("name", ["_last_checkpoint", "00000000000000000003.json", "00000000000000000000.crc"])
def test_a_pipe_or_a_link_in_a_log_is_not_opened(table, name):
    """The library would wait for it for ever, or read without end."""
    os.mkfifo(table / "_delta_log" / name)
    assert f"{name} is a pipe" in refused(f"delta://{table}")
    (table / "_delta_log" / name).unlink()
    (table / "_delta_log" / name).symlink_to("/dev/zero")
    assert f"{name} lies outside the table's folder" in refused(f"delta://{table}")


@pytest.mark.parametrize("as_checkpoint", [False, True])
def test_deletion_vectors_lead_to_no_file_outside_the_table(table, tmp_path, as_checkpoint):
    log = table / "_delta_log" / "00000000000000000000.json"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for row in rows:
        if "add" in row:
            place = {"storageType": "p", "pathOrInlineDv": "file:///dev/zero", "offset": 1, "sizeInBytes": 36}
            row["add"]["deletionVector"] = place | {"cardinality": 1}
        if "protocol" in row:
            names = {"readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]}
            row["protocol"] = {"minReaderVersion": 3, "minWriterVersion": 7, **names}
    log.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    if as_checkpoint:
        deltalake.DeltaTable(table).create_checkpoint()
        for commit in table.glob("_delta_log/*.json"):
            commit.unlink()
    assert "/dev/zero lies outside the table's folder" in refused(f"delta://{table}")


def test_tables_that_are_not_as_they_were(table, tmp_path):
    assert "the newest version is 2" in refused(f"delta://{table}@99")
    assert "its log" in refused(f"delta://{table}@2000-01-01") or "log of the table begins" in refused(
        f"delta://{table}@2000-01-01"
    )
    assert "still to come" in refused(f"delta://{table}@2199-01-01")
    assert "no such folder" in refused(f"delta://{tmp_path}/none")
    assert "no Delta table" in refused(f"delta://{tmp_path}")
    assert "No field named nope" in refused(f"delta://{table}?where=nope = 1")
    assert "no row fulfils" in refused(f"delta://{table}?where=n > 1000")

    cut = tmp_path / "cut"
    shutil.copytree(table, cut)
    file = next(cut.glob("*.parquet"))
    file.write_bytes(file.read_bytes()[:-1])
    assert "1 of 3 data files of version 2 are not whole" in refused(f"delta://{cut}")

    vacuumed = tmp_path / "vacuumed"
    shutil.copytree(table, vacuumed)
    opened = deltalake.DeltaTable(vacuumed)
    opened.optimize.compact()
    opened.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    assert "is gone" in refused(f"delta://{vacuumed}@2")

    shortened = tmp_path / "shortened"
    shutil.copytree(table, shortened)
    opened = deltalake.DeltaTable(shortened)
    opened.create_checkpoint()
    for version in (0, 1):
        (shortened / "_delta_log" / f"{version:020}.json").unlink()
    assert "version 0 cannot be opened any more" in refused(f"delta://{shortened}@0")
    assert len(read(f"delta://{shortened}")) == 30

    identity = deltalake.DeltaTable(table).metadata().id
    shutil.rmtree(table)
    deltalake.write_deltalake(table, pa.table({"text": ["other"]}))
    assert "was made again" in refused(f"delta://{table}@0#{identity}")


def test_rows_in_the_cache_outlive_the_table(table):
    resolved = resolve(f"delta://{table}")
    rows = read(resolved)
    shutil.rmtree(table)
    assert read(resolved) == rows


def test_a_copy_that_went_other_ways_is_never_taken_for_the_table(table, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(table, other)
    for place, number in ((table, 1), (other, 2)):
        deltalake.write_deltalake(place, pa.table({"text": ["x"], "label": ["a"], "n": [1000 + number]}), mode="append")
    assert max(numbers(read(f"delta://{table}"))) == 1001
    assert max(numbers(read(f"delta://{other}"))) == 1002
    shutil.rmtree(table)
    other.rename(table)
    assert "has other files than when its rows were read" in refused(f"delta://{table}")


def test_no_cloud_address_is_asked_without_credentials(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "DSTUNE_CLOUD_METADATA"):
        monkeypatch.delenv(name, raising=False)
    began = time.monotonic()
    assert "there are no credentials for s3://" in refused("delta://s3://bucket/table")
    assert "are not read" in refused("delta://dbfs:/table")
    for name in ("ACCOUNT_KEY", "SAS_KEY", "CLIENT_ID", "CLIENT_SECRET", "TENANT_ID"):
        monkeypatch.delenv(f"AZURE_STORAGE_{name}", raising=False)
        monkeypatch.delenv(f"AZURE_{name}", raising=False)
    monkeypatch.delenv("AZURE_FEDERATED_TOKEN_FILE", raising=False)
    monkeypatch.setenv("AZURE_CLIENT_ID", "alone, it is that of a managed identity: the metadata service is asked")
    assert "AZURE_CLIENT_ID + AZURE_CLIENT_SECRET" in refused("delta://abfss://c@account.dfs.core.windows.net/table")
    assert time.monotonic() - began < 1


WRITE = """
import sys
import numpy as np, pyarrow as pa, deltalake
place, count, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
random, step = np.random.default_rng(0), 10_000 if length > 1000 else 100_000
for start in range(0, count, step):
    text = [random.bytes(length // 2).hex() for _ in range(step)]
    deltalake.write_deltalake(place, pa.table({"text": text, "n": np.arange(start, start + step)}), mode="append")
"""
PEAK = """
import sys
from pathlib import Path
from dstune.data import sources
def highest():  # not ru_maxrss, which begins with what the process had that started this one
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
spec = f"delta://{sys.argv[1]}"
source = sources.data_source_of(spec)
import deltalake, pyarrow.parquet, numpy, pyarrow.dataset
before = highest()
resolved = source.resolve(spec, "data.train", lambda text: None)
print(source.describe(resolved)["rows"], (highest() - before) // 1024)
"""


MIB = 2**20


def peak(place: Path, count: int, length: int, below: float = float("inf")) -> int:
    """MiB above the imports while a table of `count` rows with `length` characters is brought to the cache.

    Where the allocators keep pages is chance, some tens of MiB of it: what is not below `below` is measured up to three times.
    """
    subprocess.run([sys.executable, "-c", WRITE, str(place), str(count), str(length)], check=True)
    readings: list[int] = []
    while not readings or (min(readings) >= below and len(readings) < 3):
        env = os.environ | {"DSTUNE_CACHE": f"{place}-cache-{len(readings)}"}
        command = [sys.executable, "-c", PEAK, str(place)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        rows, found = map(int, done.stdout.split())
        assert rows == count and found > 0
        readings.append(found)
    print(f"{count:,} rows of {length} characters: {readings} MiB above the imports")
    return min(readings)


def test_memory_does_not_grow_with_the_table(tmp_path):
    """A third of the rows that the larger table has more would be seen if it stayed in memory."""
    smaller = peak(tmp_path / "smaller", 80_000, 3000)
    most = smaller + 120_000 * 3000 / 3 / MIB
    assert peak(tmp_path / "larger", 200_000, 3000, most) < most
    assert peak(tmp_path / "million", 1_000_000, 80, 400) < 400


def test_answers_are_written_once_in_one_transaction(tmp_path):
    place, rows = tmp_path / "answers", tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"row": f"f:{n}", "predicted": "a", "vector": [0.5, n], "problem": None}) + "\n"
            for n in range(2500)
        )
    )
    source = sources.data_source_of(f"delta://{place}")
    assert source.write(f"delta://{place}", rows, "one", replace=False) == f"delta://{place}@0"
    assert "already" in source.write(f"delta://{place}", rows, "one", replace=False)
    found = deltalake.DeltaTable(place)
    assert (found.version(), found.count()) == (0, 2500)
    assert source.write(f"delta://{place}", rows, "two", replace=False) == f"delta://{place}@1"
    assert source.write(f"delta://{place}", rows, "three", replace=True) == f"delta://{place}@2"
    assert deltalake.DeltaTable(place).count() == 2500
    deltalake.write_deltalake(place, deltalake.DeltaTable(place).to_pyarrow_table(), mode="append")  # somebody else
    assert "already" in source.write(f"delta://{place}", rows, "three", replace=False)
    assert source.write(f"delta://{place}", rows, "three", replace=True) == f"delta://{place}@4", (
        "it was asked for again"
    )
    assert deltalake.DeltaTable(place).count() == 2500
    rows.write_text('{"other": 1}\n')
    with pytest.raises(UserError, match="cannot be written"):
        source.write(f"delta://{place}", rows, "four", replace=False)
    assert deltalake.DeltaTable(place).version() == 4


def test_where_nothing_can_be_written_is_known_before_anything_is_computed(tmp_path, monkeypatch):
    from dstune.inference.answers_file import answers_file

    for name in ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "DSTUNE_CLOUD_METADATA", "DATABRICKS_HOST"):
        monkeypatch.delenv(name, raising=False)
    for place, reason in (
        (f"delta://{tmp_path}/out@3", "is written to as a whole"),
        ("delta://s3://bucket/out", "there are no credentials"),
        ("uc://main.reviews.out", "DATABRICKS_HOST is not set"),
    ):
        with pytest.raises(UserError, match=reason):
            answers_file(place, {"model": "m"}, 2, force=False)


def test_answers_that_could_not_be_written_are_not_computed_again(tmp_path):
    from dstune.inference.answers_file import answers_file

    place = tmp_path / "out"
    deltalake.write_deltalake(place, pa.table({"other": [1]}))
    first = answers_file(f"delta://{place}", {"model": "m"}, 2, force=False)
    first.append([{"row": "1", "predicted": "a"}, {"row": "2", "predicted": "b"}])
    with pytest.raises(UserError, match="the answers are in"):
        first.finish()
    shutil.rmtree(place)
    again = answers_file(f"delta://{place}", {"model": "m"}, 2, force=False)
    assert again.done == 2
    again.finish()
    assert again.written == f"delta://{place}@0"
    assert deltalake.DeltaTable(place).count() == 2
    assert answers_file(f"delta://{place}", {"model": "m"}, 2, force=False).done == 0


# -- Unity Catalog, by answers recorded from its documentation ---------------------------------------------------------


@pytest.fixture
def catalog(monkeypatch, table):
    """A REST double; `answers` by path, `asked` what came."""
    answers = {
        "/api/2.1/unity-catalog/tables/main.reviews.films": (
            200,
            {
                "name": "films",
                "catalog_name": "main",
                "schema_name": "reviews",
                "table_type": "EXTERNAL",
                "data_source_format": "DELTA",
                "storage_location": f"file://{table}",
                "table_id": "9d4c5a2e-6b1f-4b0e-9c55-2f5d6f7e8a90",
            },
        ),
        "/oidc/v1/token": (200, {"access_token": "short-lived", "token_type": "Bearer", "expires_in": 3600}),
    }
    asked: list[tuple[str, str, bytes]] = []

    class Answering(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            if isinstance(answers.get(self.path), str):
                self.send_response(302)
                self.send_header("Location", answers[self.path])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked.append((self.path, self.headers.get("Authorization", ""), body))
            code, answer = answers.get(
                self.path, (404, {"error_code": "TABLE_DOES_NOT_EXIST", "message": "no such table"})
            )
            data = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _answer

        def log_message(self, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("DATABRICKS_HOST", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("DATABRICKS_TOKEN", "planted-secret")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield answers, asked
    server.shutdown()
    server.server_close()


def test_a_table_of_the_catalog(catalog, table, tmp_path):
    _, asked = catalog
    resolved = resolve("uc://main.reviews.films@1")
    assert resolved == f"uc://main.reviews.films@1#{deltalake.DeltaTable(table).metadata().id}"
    assert numbers(read(resolved)) == list(range(20))
    assert asked == [("/api/2.1/unity-catalog/tables/main.reviews.films", "Bearer planted-secret", b"")]
    for file in (tmp_path / "cache").rglob("*"):
        assert not file.is_file() or b"planted-secret" not in file.read_bytes()


def test_a_service_principal_and_refusals(catalog, monkeypatch):
    answers, asked = catalog
    monkeypatch.delenv("DATABRICKS_TOKEN")
    assert "no credentials" in refused("uc://main.reviews.films")
    monkeypatch.setenv("DATABRICKS_CLIENT_ID", "me")
    monkeypatch.setenv("DATABRICKS_CLIENT_SECRET", "planted-secret")
    resolve("uc://main.reviews.films@0")
    assert asked[-1][1] == "Bearer short-lived"
    assert b"grant_type=client_credentials" in asked[-2][2]
    assert "TABLE_DOES_NOT_EXIST" in refused("uc://main.reviews.none")
    assert "three names" in refused("uc://films")
    answers["/api/2.1/unity-catalog/tables/main.reviews.view"] = (200, {"table_type": "VIEW"})
    assert "no Delta table but VIEW" in refused("uc://main.reviews.view")
    answers["/api/2.1/unity-catalog/tables/main.reviews.closed"] = (
        403,
        {"error_code": "PERMISSION_DENIED", "message": "no"},
    )
    assert "EXTERNAL USE SCHEMA" in refused("uc://main.reviews.closed")
    # The token goes to the host that was named, and to it alone.
    answers["/api/2.1/unity-catalog/tables/main.reviews.moved"] = "/elsewhere"
    assert "a token is sent nowhere else" in refused("uc://main.reviews.moved")
    assert not [path for path, _, _ in asked if path == "/elsewhere"]
    monkeypatch.setenv("DATABRICKS_HOST", "http://dbc.example.com")
    assert "export DATABRICKS_HOST=https://dbc.example.com" in refused("uc://main.reviews.films@2")
    monkeypatch.setenv("DATABRICKS_HOST", "http://127.0.0.1:1")
    assert "does not answer" in refused("uc://main.reviews.films@2")


def test_credentials_of_the_catalog_in_the_readers_terms(catalog):
    from dstune.lakehouse.address import parse
    from dstune.lakehouse.data_sources import uc

    answers, asked = catalog
    table = {"data_source_format": "DELTA", "storage_location": "s3://bucket/films", "table_id": "9d4c"}
    answers["/api/2.1/unity-catalog/tables/main.reviews.films"] = (200, table)
    given = {"access_key_id": "key", "secret_access_key": "secret", "session_token": "session"}
    answers["/api/2.1/unity-catalog/temporary-table-credentials"] = (
        200,
        {"aws_temp_credentials": given, "expiration_time": 1},
    )
    place, options = uc.locate(parse("uc://main.reviews.films", "data.train"), "data.train", "READ")
    assert place == "s3://bucket/films"
    assert options["aws_session_token"] == "session"
    assert json.loads(asked[-1][2]) == {"table_id": "9d4c", "operation": "READ"}
    for answer, reason in (
        ({"expiration_time": 1}, "no credentials that are known"),
        ({"aws_temp_credentials": {"access_key_id": "key"}}, "no credentials that are known"),
        ({"gcp_oauth_token": {"oauth_token": "token"}}, "takes no token of the catalog"),
    ):
        answers["/api/2.1/unity-catalog/temporary-table-credentials"] = (200, answer)
        with pytest.raises(UserError, match=reason):
            uc.locate(parse("uc://main.reviews.films", "data.train"), "data.train", "READ")


def test_a_run_that_goes_on_keeps_its_version_and_mistakes_leave_nothing(table, tmp_path, monkeypatch):
    """What the launching process does, without ranks."""
    import os

    from support.tiny import save_decoder

    from dstune.checkpoint import store
    from dstune.config.flags import Flags
    from dstune.launch import train
    from dstune.launch.console import Console

    monkeypatch.chdir(tmp_path)
    save_decoder(tmp_path / "model")
    words = ["model.path=model", "task=causal_lm", "data.packing=false", "run.dir=run", "data.max_length=32"]

    def prepared(*more: str) -> str:
        found = train.prepare(train.Command(None, Flags([*words, *more]), False), Console())
        os.close(found.lock)
        return str(found.config.data.train)

    first = prepared("data.train=delta://table")
    identity = deltalake.DeltaTable(table).metadata().id
    assert first == f"delta://{table}@2#{identity}"
    assert first in (tmp_path / "run" / "run.yaml").read_text()
    folder = tmp_path / "run" / "checkpoints" / f"{store.tag(3)}.incomplete"
    folder.mkdir(parents=True)
    store.commit(folder, {"step": 3})
    deltalake.write_deltalake(table, pa.table({"text": ["x"], "label": ["a"], "n": [99]}), mode="append")
    assert prepared("data.train=delta://table") == first
    for spec in ("delta://table@99", "delta://none", "delta://table?where=nope = 1"):
        with pytest.raises(UserError, match=r"data\.train"):
            prepared(f'data.train="{spec}"', "run.dir=other")
        assert not (tmp_path / "other").exists()
