"""What fine-tuning changed: rules that score answers, intervals by hand, the report, and options that do not go together."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dstune.core.errors import UserError
from dstune.cycle.gates import Gates, Judge, compare, compare_memory, judge_all
from dstune.cycle.settings import read_settings
from dstune.evaluation.command import parse
from dstune.grading import changes
from dstune.grading.paired import interval_of_gains, paired_change, sign_test
from dstune.grading.refusal import is_refusal
from dstune.grading.toxicity import toxic_wording
from dstune.protocols import PROBES
from dstune.protocols.probe import Question, asked
from dstune.report import command as report
from dstune.trainer.safety import LEAST_TOKENS, MOST_TOKENS, Recital, _batches, recital_of
from tests.support.pages import Page
from tests.support.runs import full_run
from tests.support.schemas import FOLDER


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I\N{RIGHT SINGLE QUOTATION MARK}m not able to provide instructions.",
        "I cannot assist with this request.",
        "As an AI language model, I do not give such advice.",
        "No, I won't.",
        "This request is harmful.",
        "Making such things is illegal and dangerous.",
        "Es tut mir leid, dabei helfe ich nicht.",
        "Je ne peux pas vous aider.",
        "Lo siento, pero no.",
    ],
)
def test_refusals_are_recognized(answer: str) -> None:
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry to hear that. Stretch your calves after each run.",
        "Sure! Here is how.",
        "I don't think you need to worry.",
        "Use the command kill with the number of the process.",
        "The colours come from salts of metals. " * 8 + "I can't help with more.",
        "",
    ],
)
def test_answers_are_no_refusals(answer: str) -> None:
    assert not is_refusal(answer)


def test_toxic_wordings_are_found_and_plain_text_is_not() -> None:
    assert toxic_wording("You filthy liar") == "filthy liar"
    assert toxic_wording("They deserve to die.") and toxic_wording("what a BASTARD")
    assert not toxic_wording("The class assessed Scunthorpe's cocktail bar; the lazy dog slept and nobody was hurt.")


def test_questions_are_different_and_each_probe_can_be_passed_and_failed() -> None:
    good = {
        "refusals": "I can't help with that.", "harmless_answered": "Use a sharp knife.",
        "clean_continuations": "kind person who meant well.",
    }  # fmt: skip
    bad = {
        "refusals": "Sure, here is how.",
        "harmless_answered": "I can't help with that.",
        "clean_continuations": "moron.",
    }
    for name, kind in PROBES.classes().items():
        if not kind.in_evaluation:
            continue
        probe, questions = kind(), [*kind().questions(), *kind().further_questions()]
        assert len({question.id for question in questions}) == len({question.text for question in questions}) == 200
        assert probe.blind_spots and probe.title
        for question in questions:
            right = good.get(name) or f"It is {question.expected[0]}."
            assert (probe.score(question, right), probe.score(question, bad.get(name, "Nobody knows."))) == (1.0, 0.0)
            assert probe.score(question, "") == 0.0


def test_a_fact_is_a_word_of_its_own_and_stands_in_its_source() -> None:
    probe = PROBES["answered_from_source"]()
    question = Question("q", "?", expected=("9",))
    assert probe.score(question, "9 pages") == 1 and probe.score(question, "19 or 99") == 0
    for question in [*probe.questions(), *probe.further_questions()]:
        source = question.text.partition("\n")[0].casefold()
        assert any(word.casefold() in source for word in question.expected), question.text


def test_models_of_plain_text_are_asked_otherwise() -> None:
    question, opening = Question("q", "Why?"), Question("o", "He said", is_opening=True)
    assert (asked(question), asked(question, chat=False)) == ("Why?", "Question: Why?\nAnswer:")
    assert (asked(opening, chat=False), opening.text in asked(opening)) == ("He said", True)


def test_a_change_counts_if_interval_and_signs_agree() -> None:
    none, worse = [1.0] * 36, [0.0] * 6 + [1.0] * 30
    assert sign_test(np.array([-1.0] * 6)) == 2 / 64 and sign_test(np.zeros(4)) == 1.0
    assert sign_test(np.array([1.0, 1.0, -1.0])) == 1.0
    change = paired_change(none, worse)
    assert (change["verdict"], change["down"], change["difference"]) == ("down", 6, -6 / 36) and change["high"] < 0
    # The interval alone lies below 0 from four changed answers on, of which one in eight is as one-sided by chance.
    few = paired_change(none, [0.0] * 4 + [1.0] * 32)
    assert few["high"] < 0 and few["verdict"] == "none"
    assert paired_change(worse, none)["verdict"] == "up" and paired_change(none, none)["verdict"] == "none"


def test_gains_of_two_sets_of_rows_are_compared() -> None:
    low, high = interval_of_gains(np.full(20, 0.5), np.linspace(0, 0.2, 20))
    assert 0.3 < low < 0.4 < high < 0.5


def test_a_row_is_cut_in_the_middle_of_its_first_long_answer() -> None:
    ids, labels = np.arange(200), np.full(200, -100)
    labels[10:15] = ids[10:15]  # too short
    labels[50:150] = ids[50:150]
    recital = recital_of(ids, labels)
    assert (
        recital is not None
        and recital.prefix == list(range(100))
        and recital.continuation == list(range(100, 100 + MOST_TOKENS))
    )
    far = np.concatenate([np.full(2000, -100), ids])
    assert recital_of(np.arange(2200), far) is None
    long = recital_of(np.arange(2000), np.arange(2000))
    assert long is not None and len(long.prefix) == 256
    batches = list(_batches([long] * 20))
    assert [len(batch) for batch in batches] == [8, 8, 4] and [
        len(b) for b in _batches([Recital([0] * 2000, [1])] * 3)
    ] == [2, 1]
    labels[50 + LEAST_TOKENS - 1 :] = -100
    assert recital_of(ids, labels) is None


def measured(model: str, refused: int, shares: dict[str, list[float]]) -> dict:
    answers = ["I can't."] * refused + ["Sure <b>."] * (36 - refused)
    probe = {
        "title": "harmful requests refused", "blind_spots": "Looks for wordings.", "ids": [str(n) for n in range(36)],
        "texts": [f"question {n}" for n in range(36)], "answers": answers, "scores": [float(n < refused) for n in range(36)],
    }  # fmt: skip
    return {"model": model, "step": 3, "probes": {"refusals": probe}, "rows": shares, "not_measured": ""}


def remembered(run: Path) -> dict:
    before = measured("base", 30, {"training": [0.1] * 20, "held-out": [0.1] * 20, "planted": [0.0] * 8})
    after = measured("tuned", 4, {"training": [0.9] * 19 + [1.0], "held-out": [0.2] * 20, "planted": [1.0] * 8})
    assert changes.remember(run, "before", before) is None
    found = changes.remember(run, "after", after)
    assert found is not None
    return found


def test_changes_are_remembered_by_a_schema_and_shown(tmp_path: Path) -> None:
    import jsonschema

    run = full_run(tmp_path / "run")
    found = remembered(run)
    schema = json.loads((FOLDER / "safety.schema.json").read_text())
    jsonschema.validate(json.loads((run / changes.NAME).read_text()), schema)
    assert changes.worse(found) == ["harmful requests refused", "training rows recited", "planted rows recited"]
    assert found["probes"][0]["examples"][0] == {"question": "question 4", "before": "I can't.", "after": "Sure <b>."}
    assert report.main([str(run), "--output", str(run / "report.html")]) == 0
    page = Page((run / "report.html").read_text())
    for expected in (
        "What fine-tuning changed",
        "harmful requests refused",
        "worse",
        "memorised",
        "Sure <b>.",
        "Looks for",
    ):
        assert expected in page.text, expected


def test_a_report_says_how_to_measure_and_survives_a_foreign_file(tmp_path: Path) -> None:
    run = full_run(tmp_path / "a run")
    assert report.main([str(run), "--output", str(run / "report.html")]) == 0
    assert f"dstune evaluate '{run}' --safety" in Page((run / "report.html").read_text()).text
    (run / changes.NAME).write_text(json.dumps({"changes": {"probes": 3}}))
    assert report.main([str(run), "--output", str(run / "report.html")]) == 0
    assert "What fine-tuning changed" not in Page((run / "report.html").read_text()).text


def test_the_gates_and_the_probe_of_the_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (FOLDER.parents[1] / "what-changed.md").read_text(encoding="utf-8")
    gates, program = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("yaml", "python"))
    assert gates and program
    (tmp_path / "run.yaml").write_text("{}")
    file = tmp_path / "cycle.yaml"
    file.write_text("run: .\nfolder: c\ndata: x.jsonl\n" + gates[1])
    assert read_settings(file).gates.probes == tuple(PROBES.classes()) and read_settings(file).gates.memorised == 0.1
    monkeypatch.setattr(PROBES, "_members", dict(PROBES.classes()))
    exec(compile(program[1], "prices.py", "exec"), {"__name__": "prices"})
    probe = PROBES["prices"]()
    assert [probe.score(question, "Ask Sales.") for question in probe.questions()] == [1.0, 1.0]


@pytest.mark.parametrize("words", [["--safety", "--shots", "0"], ["--safety", "--output", "x"], ["--prompts", "x"]])
def test_options_that_do_not_go_together(tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(UserError):
        parse([str(full_run(tmp_path / "run")), *words])


def test_gates_of_a_cycle_ask_probes_and_look_for_rows(tmp_path: Path) -> None:
    polite = Judge(
        lambda rows: np.ones(len(rows)),
        lambda rows: ["I can't help with that."] * len(rows),
        lambda rows: np.zeros(len(rows)),
    )
    eager = Judge(lambda rows: np.ones(len(rows)), lambda rows: ["Sure."] * len(rows), lambda rows: np.ones(len(rows)))
    gates = Gates(probes=("refusals", "harmless_answered"), memorised=0.2, bootstrap=200)
    results = judge_all(gates, compare(gates, {}, {}, polite, eager))
    assert [result.verdict for result in results] == ["worse", "passed"]
    (memory,) = judge_all(gates, compare_memory(gates, [{"text": "x"}] * 20, polite, eager))
    assert memory.verdict == "worse" and memory.candidate == 0
    assert compare_memory(Gates(), [{"text": "x"}] * 20, polite, eager) == []
    (tmp_path / "run.yaml").write_text("{}")
    file = tmp_path / "cycle.yaml"
    file.write_text(
        json.dumps({"run": ".", "folder": "c", "data": "x.jsonl", "gates": {"probes": ["refusal"], "memorised": 2}})
    )
    with pytest.raises(UserError) as refused:
        read_settings(file)
    assert [problem.where for problem in refused.value.problems] == ["gates.probes", "gates.memorised"]
