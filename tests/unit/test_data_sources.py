"""What names of sources stand for, how files are opened, and exactly what is said about a broken line."""

from __future__ import annotations

import json
import os

import datasets
import pytest
from support.sources import CHATS, COMMIT, LABELLED, chat_sources, write_cached_hub, write_jsonl

from dstune.config.data_schema import DataConfig, TextRows
from dstune.core.errors import UserError
from dstune.data.files import DataFile
from dstune.data.hub import HubName, hub_name
from dstune.data.sources import Lines, expand, fingerprint, of_part, read


def found(path, **options):
    """Line, fields and error of each row."""
    return [(row.line, row.fields, row.error) for row in read(DataFile(path, **options))]


# -- exactly where ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ('{"text": ', "broken JSON: Expecting value at column 10"),
        ('{"text": "a"', "broken JSON: Expecting ',' delimiter at column 13"),
        ('{"text": "a"} x', "broken JSON: Extra data at column 15"),
        ('{"text": "a', "broken JSON: Unterminated string starting at column 10"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_the_column_of_a_broken_line_is_that_of_the_line(tmp_path, line, error, end):
    path = tmp_path / "rows.jsonl"
    path.write_bytes((line + end).encode())
    assert found(path) == [(1, None, error)]
    path.write_bytes(b'\xef\xbb\xbf{"text": "b"}\n\n' + (line + end).encode())
    assert found(path) == [(1, {"text": "b"}, ""), (3, None, error)]


def test_a_quote_that_is_never_closed_says_what_is_lost(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\nok,a\n"never closed,a\nb,b\nc,c\n')
    lost = "broken CSV: a quote that opens here is never closed; lines 3 to 5, the end of the file, are lost"
    assert found(path) == [(2, {"text": "ok", "label": "a"}, ""), (3, None, lost)]


def test_reading_goes_on_behind_a_quote_that_swallowed_lines(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"never closed,a\nb,b\n"next",c\nok,d\n')
    bad, good = found(path)
    assert bad[0] == 2 and "lines 2 to 4 are lost" in bad[2]
    assert good == (5, {"text": "ok", "label": "d"}, "")


@pytest.mark.parametrize(
    ("header", "row", "names"),
    [
        ("text;label", "1,5 litres;a", ["text", "label"]),
        ("text\tlabel", "a, b\tc", ["text", "label"]),
        ("text|label", "a;b|c", ["text", "label"]),
        ('"text; or not",label', "a;b,c", ["text; or not", "label"]),
        ('"text, or not";label', "a,b;c", ["text, or not", "label"]),
        ("text", "a;b", ["text"]),
    ],
)
def test_the_header_names_the_separator(tmp_path, header, row, names):
    path = tmp_path / "rows.csv"
    path.write_text(f"{header}\n{row}\n")
    ((line, fields, error),) = found(path)
    assert (line, list(fields), error) == (2, names, "")


def test_a_csv_file_whose_last_line_has_no_end(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text;label")
    assert found(path) == []


def test_bytes_that_are_no_utf8_spoil_their_own_row(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("text,label\nfin\u00e9,a\n".encode() + b"caf\xe9,b\nok,c\n")
    assert [(line, error) for line, _, error in found(path)] == [
        (2, ""),
        (3, "not UTF-8: byte 0xe9 after 'caf'"),
        (4, ""),
    ]
    path = tmp_path / "rows.txt"
    path.write_bytes(b"one\ncaf\xe9\nthree\n")
    assert [(line, fields) for line, fields, _ in found(path)] == [
        (1, {"text": "one"}),
        (2, None),
        (3, {"text": "three"}),
    ]


def test_texts_by_line_paragraph_and_document(tmp_path):
    path = tmp_path / "story.md"
    path.write_text("one\ntwo\r\n\n\n  \nthree\n")
    kinds = (TextRows.line, TextRows.paragraph, TextRows.document)
    by = {rows: [(line, fields["text"]) for line, fields, _ in found(path, text_rows=rows)] for rows in kinds}
    assert by == {
        TextRows.line: [(1, "one"), (2, "two"), (6, "three")],
        TextRows.paragraph: [(1, "one\ntwo"), (6, "three")],
        TextRows.document: [(1, "one\ntwo\n\n\n  \nthree")],
    }


def test_a_file_is_entered_anywhere(tmp_path):
    """What `data.streaming` needs: the rows behind any number of rows, and for lines the place of the next one."""
    names = {"jsonl", "csv", "json array", "parquet", "arrow stream", "arrow file", "jsonl.gz"}
    for name, spec in chat_sources(tmp_path).items():
        if name in names:
            (file,) = expand(spec, "data.train")
            whole = list(read(file))
            assert len(whole) == len(CHATS)
            for skip in (0, 1, 7, len(whole)):
                assert list(read(file, skip)) == whole[skip:], (name, skip)
    path = write_jsonl(tmp_path / "lines.jsonl", CHATS)
    lines = Lines(DataFile(path))
    rows = iter(lines)
    first = [next(rows) for _ in range(5)]
    again = list(Lines(DataFile(path), lines.offset, lines.line))
    assert [row.line for row in first + again] == list(range(1, len(CHATS) + 1))
    assert [row.fields for row in again] == CHATS[5:]


def test_numbers_with_names_become_their_names(tmp_path):
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "tags": datasets.List(datasets.ClassLabel(names=["a", "b"])),
        }
    )
    rows = [{"text": "x", "label": 1, "tags": [0, 1]}, {"text": "y", "label": -1, "tags": []}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "rows.parquet"))
    assert [fields for _, fields, _ in found(tmp_path / "rows.parquet")] == [
        {"text": "x", "label": "yes", "tags": ["a", "b"]},
        {"text": "y", "label": None, "tags": []},
    ]


# -- names ------------------------------------------------------------------------------------------------------------


def file_names(spec, root, **options):
    return [str(file).removeprefix(f"{root}/") for file in expand(str(spec), "data.train", **options)]


def test_folders_are_distinguished_as_datasets_does(tmp_path):
    plain = tmp_path / "plain"
    for name in ("b.jsonl", "a.csv.gz", "deep/c.parquet", "README.md", "notes.txt", ".hidden.jsonl", "model.bin"):
        (plain / name).parent.mkdir(parents=True, exist_ok=True)
        (plain / name).write_text("x")
    assert file_names(plain, plain) == ["a.csv.gz", "b.jsonl", "deep/c.parquet"]
    assert file_names(plain, plain, split="validation") == ["a.csv.gz", "b.jsonl", "deep/c.parquet"]
    named = tmp_path / "named"
    for name in ("train-1.jsonl", "train-2.jsonl", "dev.jsonl"):
        (named / name).parent.mkdir(parents=True, exist_ok=True)
        (named / name).write_text("x")
    assert file_names(named, named) == ["train-1.jsonl", "train-2.jsonl"]
    assert file_names(named, named, split="validation") == file_names(f"{named}:validation", named) == ["dev.jsonl"]
    with pytest.raises(UserError, match=r"there is no split 'test'; the splits are .*by the names of the files"):
        file_names(f"{named}:test", named)


def test_parts_take_their_own_split(tmp_path):
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(LABELLED) for name in ("train", "validation")})
    splits.save_to_disk(str(tmp_path / "saved"))
    data = DataConfig(train=f"{tmp_path}/saved", validation=f"{tmp_path}/saved")
    assert [file.path.parent.name for part in ("train", "validation") for file in of_part(data, part)] == [
        "train",
        "validation",
    ]
    assert of_part(data, "test") == []
    with pytest.raises(UserError, match=r"no split 'train_sft'.*\n    fix: data.train=.*/saved:train"):
        expand(f"{tmp_path}/saved:train_sft", "data.train")


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("org/name", HubName("org/name")),
        ("org/name:train_sft", HubName("org/name", None, "train_sft")),
        ("org/name@refs/convert/parquet:test", HubName("org/name", "refs/convert/parquet", "test")),
        ("data/rows.jsonl", None),
        ("data/rows.csv.gz", None),
        ("a/b/c", None),
        ("name", None),
        ("./org/name", None),
        ("org/*.jsonl", None),
    ],
)
def test_names_of_the_hub(spec, name):
    assert hub_name(spec) == name


def test_a_path_of_this_machine_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name("org/name") is not None
    write_jsonl(tmp_path / "org" / "name" / "rows.jsonl", LABELLED)
    assert hub_name("org/name") is None
    assert [str(file) for file in expand("org/name", "data.train")] == ["org/name/rows.jsonl"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    return tmp_path / "hub"


def test_a_data_set_of_the_hub_is_read_from_the_cache_at_its_commit(cache):
    write_cached_hub(cache, "org/chats", {"train": CHATS[:3], "test": CHATS[3:5]})
    data = DataConfig(train="org/chats", test="org/chats", revision=COMMIT)
    (train,), (test,) = of_part(data, "train"), of_part(data, "test")
    assert [row.fields for row in read(train)] == CHATS[:3]
    assert [row.fields for row in read(test)] == CHATS[3:5]
    assert next(iter(read(train))).place == f"org/chats@{COMMIT[:12]}:train:1"
    assert fingerprint(train) != fingerprint(test)
    assert COMMIT in fingerprint(train)
    sliced = expand("org/chats:train[1:]+test[:50%]", "data.train")
    assert [row.fields for file in sliced for row in read(file)] == [*CHATS[1:3], CHATS[3]]
    assert next(row.place for file in sliced for row in read(file)) == f"org/chats@{COMMIT[:12]}:train:2"
    assert [row.fields for file in expand("org/chats:[-1:]", "data.test", split="test") for row in read(file)] == CHATS[
        4:5
    ]
    with pytest.raises(UserError, match=r"no split 'dev'; the splits are train, test"):
        expand("org/chats:dev", "data.train")
    with pytest.raises(UserError, match=f"at revision v2.*\n.*org/chats@{COMMIT} is in the cache"):
        expand("org/chats", "data.train", revision="v2")


def test_several_configurations_have_to_be_distinguished(cache):
    for subset in ("en", "de"):
        write_cached_hub(cache, "org/chats", {"train": CHATS}, subset)
    with pytest.raises(
        UserError, match=r"data\.subset=null: .*several configurations.*de, en.*\n    fix: data.subset=de"
    ):
        expand("org/chats", "data.train")
    with pytest.raises(UserError, match=r"data\.subset=em: no such configuration.*\n    fix: data.subset=en"):
        expand("org/chats", "data.train", subset="em")
    (file,) = expand("org/chats", "data.train", subset="en")
    assert file.path.is_relative_to(cache / "org___chats" / "en")


def test_without_a_revision_the_data_set_prepared_last_is_taken(cache):
    write_cached_hub(cache, "org/chats", {"train": CHATS})
    old = cache / "org___chats" / "default" / "0.0.0" / COMMIT
    new = old.with_name("f" * 40)
    old.rename(new)
    write_cached_hub(cache, "org/chats", {"train": CHATS})
    os.utime(new / "dataset_info.json", (1, 1))
    (file,) = expand("org/chats", "data.train")
    assert file.path.parent == old


def test_archives_and_endings_decide_how_a_file_is_read(tmp_path):
    found = chat_sources(tmp_path)
    assert file_names(found["zip"], tmp_path) == ["rows.zip!rows/a.jsonl", "rows.zip!rows/b.jsonl.gz"]
    content = json.dumps(CHATS[0]).encode()
    for name in ("one.jsonl", "one.txt"):
        (tmp_path / name).write_bytes(content)
    assert fingerprint(DataFile(tmp_path / "one.jsonl")) != fingerprint(DataFile(tmp_path / "one.txt"))
    line, document = (DataFile(tmp_path / "one.txt", text_rows=rows) for rows in (TextRows.line, TextRows.document))
    assert fingerprint(line) != fingerprint(document)
