"""Held-out rows that a reference is made of, found again in the files of the run."""

from __future__ import annotations

import json
from pathlib import Path

from support.configs import run_config

from dstune.config.data_schema import DataConfig
from dstune.inference.reference_rows import _read_fields


def written(file: Path, *texts: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def texts_at(config, *places: str) -> dict[str, str]:
    return {place: fields["text"] for place, (fields, _) in _read_fields(config, "validation", places).items()}


def test_rows_of_a_file_that_has_moved_are_found(tmp_path):
    file = written(tmp_path / "now" / "rows.jsonl", "one", "two", "three")
    config = run_config(data=DataConfig(train="x.jsonl", validation=str(file)))
    assert texts_at(config, "/before/rows.jsonl:3", "/before/rows.jsonl:1") == {
        "/before/rows.jsonl:1": "one",
        "/before/rows.jsonl:3": "three",
    }
    assert texts_at(config, "/before/others.jsonl:1", "/before/rows.jsonl:9") == {}


def test_files_of_one_name_are_compared_whole(tmp_path):
    for folder in ("a", "b"):
        written(tmp_path / "data" / folder / "rows.jsonl", folder)
    config = run_config(data=DataConfig(train="x.jsonl", validation=str(tmp_path / "data" / "*" / "rows.jsonl")))
    there = str(tmp_path / "data" / "b" / "rows.jsonl")
    assert texts_at(config, f"{there}:1", "/before/a/rows.jsonl:1") == {f"{there}:1": "b"}
