"""Answers as CSV and Parquet: the rows of the JSON lines, whatever they hold, also behind a killed command."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dstune.core.errors import UserError
from dstune.inference.answers_file import answers_file

ROWS = [
    {"row": "a.csv:2", "text": 'one, "two"\nthree', "predicted": "x", "probability": 0.5, "n": 1, "tags": ["A", "B"]},
    {"row": "a.csv:4", "text": "vier\u00e4", "predicted": None, "probability": 1, "n": "one", "tags": []},
    {"row": "a.csv:5", "problem": "no token", "sure": True, "n": None},
]


def written(path: Path, batches: list[list[dict]]) -> Path:
    output = answers_file(path, {"count": 3}, 1, force=False)
    for rows in batches[output.done :]:
        output.append(rows)
    output.finish()
    assert output.written == str(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing else is left"
    return path


@pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_csv(tmp_path, ending, delimiter):
    path = written(tmp_path / f"answers.{ending}", [[row] for row in ROWS])
    with path.open(encoding="utf-8", newline="") as stream:
        found = list(csv.DictReader(stream, delimiter=delimiter))
    assert list(found[0]) == ["row", "text", "predicted", "probability", "n", "tags", "problem", "sure"]
    assert (found[0]["text"], found[0]["tags"], found[0]["problem"]) == ('one, "two"\nthree', '["A", "B"]', "")
    assert (found[1]["text"], found[1]["predicted"], found[1]["probability"]) == ("vier\u00e4", "", "1")
    assert (found[2]["problem"], found[2]["sure"], found[2]["text"]) == ("no token", "true", "")


def test_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr("dstune.inference.answer_tables.ROWS_AT_ONCE", 1)
    found = pq.read_table(written(tmp_path / "answers.parquet", [[row] for row in ROWS])).to_pylist()
    names = ["row", "text", "predicted", "probability", "n", "tags", "problem", "sure"]
    rest = [{name: row.get(name) for name in names} for row in ROWS]
    texts = ["1", '"one"', None]  # values of several types are JSON text
    assert found == [{**row, "n": text} for row, text in zip(rest, texts, strict=True)]


def test_a_killed_command_goes_on_into_the_same_table(tmp_path):
    path = tmp_path / "answers.csv"
    answers_file(path, {"count": 3}, 1, force=False).append(ROWS[:1])
    assert not path.exists()
    written(path, [[row] for row in ROWS])
    assert len(path.read_text(encoding="utf-8").splitlines()) == 5, "the header, and a text of two lines"
    with pytest.raises(UserError, match="exists already"):
        answers_file(path, {"count": 3}, 1, force=False)


def test_no_spreadsheet_is_written(tmp_path):
    with pytest.raises(UserError, match="answers are written as JSON lines, not as xlsx"):
        answers_file(tmp_path / "answers.xlsx", {}, 1, force=False)
