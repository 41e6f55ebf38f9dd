"""Answers of any task as a line of text and as JSON, a plugin's included."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from support.configs import run_config

from dstune.inference import load, predict
from dstune.inference.predict import _lines, _row
from dstune.inference.rows import Query
from dstune.tasks.classification.config import ClassificationConfig

TEXT = Query("x:1", {"text": "w1", "stars": 2}, {"text": "w1"})


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ({"predicted": "good", "probability": 0.75}, "good  0.750  w1"),
        ({"predicted": ["a", "b"], "probability": {"a": 0.5, "b": 0.25}}, "a 0.500, b 0.250  w1"),
        ({"predicted": 0.5}, "0.5000  w1"),
        ({"predicted": ["O", "B-X"], "entities": []}, "-  w1"),
        ({"predicted": None, "score": 1.0}, "  1.0000  w1"),
        ({"vector": [0.5] * 6}, "[0.5000, 0.5000, 0.5000, 0.5000, ...] 6 numbers  w1"),
        ({"problem": "is empty"}, "no answer: is empty  w1"),
        # of plugins
        ({"stars": 4, "truncated": True}, "stars 4  w1"),
        ({"stars": {"food": 4.0, "place": [1, 2]}}, "stars food 4.0000, place 1 2  w1"),
        ({"predicted": 4}, "4  w1"),
        ({"predicted": 0}, "0  w1"),
        ({"predicted": False}, "False  w1"),
        ({"predicted": [0, 1]}, "0 1  w1"),
        ({"predicted": ["a"], "probability": {"other": 0.5}}, "a -  w1"),
        ({"score": "high"}, "score high  w1"),
    ],
)
def test_the_line_of_an_answer(answer, line):
    assert list(_lines([TEXT], [answer])) == [line]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}]}, "Hi"),
        ({"tokens": ["a", "b"]}, "a b"),
        ({"body": "w1 w2", "year": 1999}, "body w1 w2, year 1999"),
        ({"messages": []}, "messages -"),
    ],
)
def test_the_text_of_a_row(row, text):
    assert list(_lines([Query("x:1", {}, row)], [{"predicted": 1}])) == [f"1  {text}"]


def test_an_answer_takes_the_place_of_a_column_of_its_name():
    assert _row(TEXT, {"stars": 4}, {"row", "stars"}) == {"row": "x:1", "text": "w1", "stars": 4}
    assert _row(TEXT, {"problem": "is empty"}, {"row", "stars"}) == {"row": "x:1", "text": "w1", "problem": "is empty"}


def test_a_column_that_a_plugin_answers_is_noted_and_replaced(tmp_path, monkeypatch, capsys):
    class Stars:
        def answers(self, rows, batch_size, *, all_labels):
            return [{"problem": "is odd"} if number % 2 else {"stars": 4} for number, _ in enumerate(rows)]

    config = run_config(task=ClassificationConfig(labels=["a", "b"]))
    monkeypatch.setattr(load, "find", lambda *given: SimpleNamespace(config=config, labels=("a", "b"), identity="x"))
    monkeypatch.setattr(load, "load", lambda *given: Stars())
    rows = [{"text": f"w{number}", "stars": 1, "year": 1999} for number in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert predict.main(["model", "--input", str(tmp_path / "rows.jsonl"), "--json"]) == 0
    printed = capsys.readouterr()
    found = [json.loads(line) for line in printed.out.splitlines()]
    assert [row.get("stars") for row in found] == [4, None, 4] and all(row["year"] == 1999 for row in found)
    (note,) = [line for line in printed.err.splitlines() if line.startswith("columns that answers have too")]
    assert note.endswith(": stars")
