"""`dstune compare`: a worse model is called worse, an equal one passes, and too few rows are undecided."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dstune.core.errors import UserError
from dstune.recording import kinds
from dstune.recording.command import main as record
from dstune.recording.compare import main
from dstune.recording.kinds import Row, agreement, kinds_of
from tests.support.hosted_double import Hosted, serving


def rows_of(count: int, old: float, new: float, seed: int) -> list[Row]:
    """Rows with two classes, of which both models get most right, with these shares, independently."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        label = ("yes", "no")[number % 2]
        answers = [label if generator.random() < share else "perhaps" for share in (old, new)]
        rows.append(Row(f"question {number}", label, *answers))
    return rows


def verdicts(count: int, old: float, new: float, seeds: int = 100) -> Counter[str]:
    return Counter(
        kinds.verdict_of_all(kinds.decide_kinds(kinds_of(rows_of(count, old, new, seed))[0], 0.05, 0.025))
        for seed in range(seeds)
    )


def test_verdicts_over_seeds():
    equal, worse, few = verdicts(1500, 0.9, 0.9), verdicts(1500, 0.9, 0.78), verdicts(40, 0.9, 0.9)
    at_margin = verdicts(400, 0.9, 0.85)
    print(equal, worse, few, at_margin)
    assert equal["passed"] >= 80 and equal["worse"] <= 3
    assert worse["worse"] >= 95 and worse["passed"] == 0
    assert few["undecided"] >= 80 and few["worse"] <= 3
    assert at_margin["passed"] <= 6  # 2.5% are expected
    gates = kinds.decide_kinds(kinds_of(rows_of(40, 0.9, 0.9, 0))[0], 0.05, 0.025)
    assert gates[0].verdict == "undecided" and (gates[0].rows_needed or 0) > 40


def recorded(folder: Path, model: str, prompts: Path, wrong: int, monkeypatch) -> Path:
    """Record a model that gives every `wrong`th prompt the wrong answer; 0 for none."""
    hosted = Hosted(jobs=1, rows=5)
    monkeypatch.setenv("OPENAI_API_KEY", hosted.key)

    def answer(body):
        completion = hosted.complete(body)
        number = int(body["messages"][0]["content"].split()[-1])
        text = json.dumps({"total": number, "currency": "EUR" if not wrong or number % wrong else "USD"})
        completion["choices"][0]["message"]["content"] = text
        return completion

    hosted.answer = answer
    with serving(hosted) as url:
        assert record([str(folder), "--server", f"{url}/v1", "--prompts", str(prompts), "--models", model]) == 0
    return folder


def test_two_recordings_end_to_end(tmp_path, monkeypatch, capsys):
    def row(number: int) -> dict:
        answer = json.dumps({"currency": "EUR", "total": number})
        question = {"role": "user", "content": f"<b>question</b> {number}"}
        return {"messages": [question, {"role": "assistant", "content": answer}]}

    prompts = tmp_path / "prompts.jsonl"
    trained = {"messages": [{"role": "user", "content": "question 0 3"}, {"role": "assistant", "content": "x"}]}
    prompts.write_text("".join(json.dumps(each) + "\n" for each in [*map(row, range(1, 301)), trained]))
    old = recorded(tmp_path / "old", "ft:old", prompts, 0, monkeypatch)
    equal = recorded(tmp_path / "equal", "mine", prompts, 0, monkeypatch)
    worse = recorded(tmp_path / "worse", "mine", prompts, 3, monkeypatch)
    assert main([str(old), str(equal), "--output", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert (
        "passed     JSON: agreement of fields" in out and "1 prompts are left out: a model was trained on them" in out
    )
    assert main([str(old), str(worse), "--output", str(tmp_path / "b")]) == 1
    result = json.loads((tmp_path / "b" / "comparison.json").read_text())
    assert result["verdict"] == "worse"
    assert [(gate["name"], gate["rows"], gate["verdict"]) for gate in result["gates"]] == [
        ("JSON: agreement of fields", 300, "worse"),
        ("JSON: valid", 300, "passed"),
    ]
    assert result["gates"][0]["candidate"] == pytest.approx(1 - 100 / 300 / 2)
    page = (tmp_path / "b" / "report.html").read_text()
    assert "<b>question" not in page and "&lt;b&gt;question&lt;/b&gt; 3" in page and "USD" in page
    with pytest.raises(UserError, match="it has no answers of other"):
        main([str(old), str(equal), "--output", str(tmp_path / "c"), "--new-model", "other"])
    with pytest.raises(UserError, match="is no recording, run or model"):
        main([str(tmp_path), str(equal), "--output", str(tmp_path / "c")])


def test_kinds_of_tasks_follow_from_the_expected_answers():
    rows = [Row("q", "yes" if n % 2 else "no", "yes", "no") for n in range(10)]
    rows += [Row("q", "a longer sentence with many words, which is no class at all " * 2, "a", "b")] * 6
    rows += [Row("q", '{"a": 1}', "{}", "")] * 4
    known, notes = kinds_of(rows)
    assert [(kind.name, len(kind.rows)) for kind in known] == [("classes", 10), ("texts", 6)]
    assert notes == ["4 prompts of the kind 'JSON' are too few"]
    assert kinds_of([Row("q", f"answer {n}", "", "") for n in range(9)])[0][0].name == "short answers"


@pytest.mark.parametrize(
    ("answer", "score"),
    [('{"a": 1, "b": 2}', 1.0), ('{"a": 1}', 0.5), ('{"a": 1, "b": 2, "c": 3}', 2 / 3), ("no JSON", 0.0), ("[1]", 0.0)],
)
def test_agreement_of_fields(answer, score):
    assert agreement(answer, '{"a": 1, "b": 2}') == pytest.approx(score)
