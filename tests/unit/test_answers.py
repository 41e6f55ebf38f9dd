"""task=question_answering: SQuAD's files, windows of a long text, spans, and the metrics of SQuAD's scripts."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torchmetrics.functional.text import squad
from unit.data_helpers import data_run, prepared, refusal_of, wordpiece, write_jsonl

from dstune.config.data_schema import CleanConfig, OnBadRow, SplitConfig
from dstune.data.clean.rows import map_texts
from dstune.data.collate import collate
from dstune.data.sampler import MicroBatch
from dstune.data.sources import DataFile, count, has_lines, read
from dstune.data.stream import FileShard
from dstune.protocols import task_of
from dstune.tasks.question_answering.config import QuestionAnsweringConfig
from dstune.tasks.question_answering.encode import AnswerEncoder
from dstune.tasks.question_answering.head import AnswerHead, best_span
from dstune.tasks.question_answering.metrics import answer_metrics
from dstune.trainer.measure import Totals

CONTEXT = "the cat sat on the mat in the sun"
NOTHING_HELD_OUT = SplitConfig(validation=0.0)


def row(text: str, start: int | None = None, **more) -> dict:
    start = CONTEXT.index(text) if start is None else start
    answers = {"text": [text], "answer_start": [start]}
    return {"question": "where", "context": CONTEXT, "answers": answers, **more}


# ---- rows ----


def test_the_files_of_squad(tmp_path):
    """Version 1 nested, version 2 with questions without an answer, and flat rows give the same."""
    questions = [
        {"id": "a", "question": "where", "answers": [{"text": "mat", "answer_start": 19}] * 2},
        {"id": "b", "question": "why", "answers": [], "is_impossible": True, "plausible_answers": [{}]},
    ]
    nested = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": questions}]}]}
    path = tmp_path / "train.json"
    path.write_text(json.dumps(nested, indent=1))
    flat = [row("mat", id="a"), {"question": "why", "context": CONTEXT, "answers": {"text": [], "answer_start": []}}]
    task = QuestionAnsweringConfig(no_answer=True)
    runs = [
        prepared(data_run(file, task=task, packing=False, split=NOTHING_HELD_OUT), wordpiece(), tmp_path / "cache")
        for file in (path, write_jsonl(tmp_path / "flat.jsonl", flat))
    ]
    for data in runs:
        first, second = data.train.sample(0), data.train.sample(1)
        tokens = wordpiece().convert_ids_to_tokens(first["input_ids"][first["start"] : first["end"] + 1])
        assert tokens == ["m", "##a", "##t"]
        assert second["start"] == second["end"] == second["null"] == 0
    assert runs[0].train.table.to_list() == runs[1].train.table.to_list()


def test_lines_with_several_questions_are_counted_and_entered_as_rows(tmp_path):
    paragraphs = [{"context": CONTEXT, "qas": [{"id": f"{line}{place}"} for place in "ab"]} for line in "12"]
    path = write_jsonl(tmp_path / "rows.jsonl", [paragraphs[0], {"title": "t", "paragraphs": paragraphs[1:]}])
    file = DataFile(path)
    assert [(row.line, row.fields["id"]) for row in read(file)] == [(1, "1a"), (1, "1b"), (2, "2a"), (2, "2b")]
    assert count(file) == 4
    assert not has_lines(file), "a line is not a row, so a stream cannot enter at one"
    assert [row.fields["id"] for row in FileShard(file).rows(3, None)] == ["2b"]


@pytest.mark.parametrize("column", [{"data": []}, {"data": [1]}, {"paragraphs": []}, {"paragraphs": ["a"]}])
def test_columns_with_the_names_of_squad_are_no_squad(tmp_path, column):
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "a", **column}]))
    assert [found.fields for found in read(DataFile(tmp_path / "rows.json"))] == [{"text": "a", **column}]


def test_a_damaged_paragraph_of_squad_is_one_bad_row(tmp_path):
    paragraphs = [{"context": CONTEXT, "qas": [{"id": "1"}]}, {"context": CONTEXT}, "torn"]
    (tmp_path / "rows.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    found = list(read(DataFile(tmp_path / "rows.json")))
    assert [row.error for row in found] == ["", *["a paragraph without a list of questions (qas)"] * 2]


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("whole", [True, False])
def test_an_article_without_paragraphs_has_no_rows(tmp_path, place: int, whole: bool):
    articles = [{"title": "B", "paragraphs": [{"context": CONTEXT, "qas": [{"id": "1"}]}, {"context": CONTEXT}]}]
    articles.insert(place, {"title": "A", "paragraphs": []})
    (tmp_path / "rows.json").write_text(json.dumps({"data": articles} if whole else articles))
    found = list(read(DataFile(tmp_path / "rows.json")))
    assert [(row.fields or {}).get("title") for row in found] == ["B", None]


def test_an_article_of_paragraphs_without_questions_is_bad(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"title": "A", "paragraphs": [{"context": CONTEXT}]}]))
    [row] = read(DataFile(tmp_path / "rows.json"))
    assert "without a list of questions" in row.error


def test_bad_rows(tmp_path):
    rows = [
        row("mat"),
        row("mat", 18, id="x7"),
        row("dog", 3),
        {"question": "why", "context": CONTEXT, "answers": []},
        {"question": "why", "context": CONTEXT, "answers": {"text": ["cat"], "answer_start": []}},
        {"question": " ", "context": CONTEXT, "answers": []},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    problems = refusal_of(data_run(path, task=QuestionAnsweringConfig(), packing=False), wordpiece(), tmp_path)
    assert [problem.where for problem in problems] == [f"{path}:{line}" for line in range(2, 7)]
    reasons = [
        "question 'x7': answer 'mat' is not at character 18 of its context (it is at 19)",
        "nowhere in it",
        "task.no_answer=true",
        "as many answer_start",
        "is empty",
    ]
    assert all(reason in problem.reason for reason, problem in zip(reasons, problems, strict=True)), problems
    task = QuestionAnsweringConfig(no_answer=True)
    config = data_run(path, task=task, packing=False, on_bad_row=OnBadRow.skip, split=NOTHING_HELD_OUT)
    assert prepared(config, wordpiece(), tmp_path / "cache").report["train"]["bad_rows"] == 4


def test_cleaning_moves_the_answers_with_their_text():
    """Decomposed letters become one and a zero-width space vanishes, in front of the answer and in it."""
    context = "\u200bla cafe\u0301 au cafe\u0301 noir"
    before = {"question": "q", "context": context, "answers": [{"text": "cafe\u0301", "start": context.rindex("cafe")}]}

    def composed(text: str) -> str:
        return text.replace("e\u0301", "\xe9").replace("\u200b", "")

    after = map_texts(before, composed)
    (answer,) = after["answers"]
    assert answer == {"text": "caf\xe9", "start": after["context"].rindex("caf\xe9")} and answer["start"] == 11
    # An answer that is lost takes its row with it: it must not become a question without an answer.
    assert map_texts(before, lambda text: text.replace("cafe\u0301", ""))["context"] == ""


# ---- windows ----


@pytest.mark.parametrize("stride", [0, 4, 128])
def test_windows_of_a_long_text(stride):
    """Every token is in a window, the answer is marked where all of it is, and its characters come back."""
    task = QuestionAnsweringConfig(stride=stride)
    normal = {"question": "where is it", "context": CONTEXT, "answers": [{"text": "mat", "start": 19}]}
    samples = AnswerEncoder(wordpiece(), task, 24)([normal], [5])
    assert len(samples) > 2 and {sample.row for sample in samples} == {5}
    seen: set[int] = set()
    marked = 0
    for sample in samples:
        columns = sample.columns
        assert len(sample.input_ids) <= 24 and sample.truncated and sample.weight == 1
        seen |= {at for a, b in zip(columns["char_start"], columns["char_end"], strict=True) for at in range(a, b)}
        if columns["start"] != columns["null"]:
            marked += 1
            assert CONTEXT[columns["char_start"][columns["start"]] : columns["char_end"][columns["end"]]] == "mat"
    assert seen == {at for at, letter in enumerate(CONTEXT) if letter != " "}
    assert marked >= 1
    long_question = dict(normal, question="x" * 100)
    assert max(len(sample.input_ids) for sample in AnswerEncoder(wordpiece(), task, 24)([long_question], [0])) <= 24


def test_the_loss_of_a_row_does_not_depend_on_the_padding(tmp_path):
    rows = [row("mat"), {"question": "who", "context": "the cat", "answers": [{"text": "cat", "answer_start": 4}]}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = data_run(path, task=QuestionAnsweringConfig(), packing=False, split=NOTHING_HELD_OUT)
    data = prepared(config, wordpiece(), tmp_path / "cache")

    def loss(*chosen: int) -> float:
        batch = collate(data.train, MicroBatch(0, tuple((index,) for index in chosen)), pad_token_id=0, packing=False)

        def forward(**inputs):
            logits = inputs["input_ids"].float() / 7
            return type("Output", (), {"start_logits": logits, "end_logits": -logits})

        output = AnswerHead(30)(forward, batch)
        real = batch["attention_mask"][0].bool()
        if len(chosen) == 1:
            logits = batch["input_ids"][:1, real].float() / 7
            expected = functional.cross_entropy(logits, batch["start_positions"][:1])
            expected = (expected + functional.cross_entropy(-logits, batch["end_positions"][:1])) / 2
            assert float(output.loss_sum) == pytest.approx(float(expected))
        assert output.weight == len(chosen)
        return float(output.loss_sum)

    assert loss(0, 1) == pytest.approx(loss(0) + loss(1))
    filler = collate(data.train, MicroBatch(0, ((0,),), filler=True), pad_token_id=0, packing=False)
    assert filler["start_positions"].tolist() == filler["end_positions"].tolist() == [-100]


def test_the_best_span_is_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    starts, ends = (torch.randn(5, 17, generator=generator) for _ in range(2))
    inside = torch.rand(5, 17, generator=generator) > 0.3
    inside[4] = False
    score, first, last = best_span(starts, ends, inside, 4)
    for number in range(5):
        spans = [(i, j) for i in range(17) for j in range(i, min(i + 4, 17)) if inside[number, i] and inside[number, j]]
        if not spans:
            assert score[number] == -torch.inf
            continue
        best = max(spans, key=lambda span: float(starts[number, span[0]] + ends[number, span[1]]))
        assert (int(first[number]), int(last[number])) == best


# ---- metrics ----

PLANTED = [
    ("the mat", ["mat"]),
    ("The  Mat.", ["a mat", "carpet"]),
    ("on the red mat", ["red mat", "the mat of the cat"]),
    ("", ["mat"]),
    ("dog", ["cat", "mouse"]),
    ("cat cat", ["cat", "the cat cat dog"]),
    ("J. R. R. Tolkien's", ["JRR Tolkiens"]),
    ("twenty-one", ["twenty one"]),
]


def test_exact_match_and_f1_are_those_of_the_script():
    """Version 1.1 as torchmetrics has it, row by row and together; F1 by hand where it is neither 0 nor 1."""
    for predicted, right in PLANTED:
        found = answer_metrics([predicted], [right])
        answers = {"answer_start": [0] * len(right), "text": right}
        expected = squad([{"prediction_text": predicted, "id": "0"}], [{"answers": answers, "id": "0"}])
        assert found["exact_match"] == pytest.approx(float(expected["exact_match"]) / 100), predicted
        assert found["f1"] == pytest.approx(float(expected["f1"]) / 100), predicted
    found = answer_metrics(*map(list, zip(*PLANTED, strict=True)))
    assert found["exact_match"] == pytest.approx(2 / 8)
    assert found["f1"] == pytest.approx(np.mean([1, 1, 0.8, 0, 0, 0.8, 1 / 3, 0]))
    # Nothing is left of either: equal, but without a word in common (version 2 counts that as 1, torchmetrics always).
    assert answer_metrics(["the"], [["the"]]) == {"exact_match": 1.0, "f1": 0.0}


def test_questions_without_an_answer():
    """Four with an answer and two without; the second one's margin is above the threshold of 0, the last one's too."""
    predicted = ["mat", "cat", "dog", "sun", "cat", "mat"]
    right = [["mat"], ["cat"], ["cat"], ["the sun"], [], []]
    margins = [-3.0, 0.5, -2.0, -1.0, -0.5, 2.0]
    found = answer_metrics(predicted, right, margins)
    assert found["exact_match"] == found["f1"] == pytest.approx(3 / 6)  # mat, sun, and none for the last
    assert found["exact_match_answerable"] == pytest.approx(2 / 4)
    assert found["exact_match_unanswerable"] == pytest.approx(1 / 2)
    # Spans for the three surest: right, wrong, right; the last two keep none. With the cat, one of them loses its none.
    assert found["best_f1"] == pytest.approx(4 / 6) and found["best_threshold"] == -1.0
    moved = answer_metrics(predicted, right, margins, threshold=-1.0)
    assert moved["f1"] == pytest.approx(found["best_f1"])
    # Articles alone are no answer, and equal to none.
    assert answer_metrics(["the"], [["a"]], [-1.0])["f1"] == 1.0


def test_windows_of_a_question_are_measured_together(tmp_path):
    """The best span of all windows answers; one window that is sure of an answer outvotes those that know of none."""
    path = write_jsonl(tmp_path / "rows.jsonl", [row("mat"), row("sun", question="what")])
    task = QuestionAnsweringConfig(stride=4, no_answer=True)
    config = data_run(path, task=task, packing=False, max_length=24)
    held = replace(config.data, validation=str(path), clean=CleanConfig(leaks=False))
    data = prepared(replace(config, data=held), wordpiece(), tmp_path / "cache")
    split = data.validation
    assert split.texts is not None and len(split.lengths) == 4
    kept = [
        {"score": np.float32(0), "null": np.float32(5), "char_start": np.int64(0), "char_end": np.int64(3)}
        for _ in split.lengths
    ]
    for number in (0, 1):
        question = json.loads(split.texts[number]["row"])
        window = int(np.flatnonzero(split.origins == number)[1])
        answer = question["answers"][0]
        end = answer["start"] + len(answer["text"])
        kept[window] = {"score": np.float32(9), "null": np.float32(1), "char_start": answer["start"], "char_end": end}
    evaluation = task_of(task).measure((), split, Totals(10.0, 5.0, 0.0), kept)
    assert evaluation.metrics["exact_match"] == 1.0 and evaluation.metrics["targets"] == 2
    kept[int(np.flatnonzero(split.origins == 0)[1])]["score"] = np.float32(0.5)  # less than every window's null
    assert task_of(task).measure((), split, Totals(10.0, 5.0, 0.0), kept).metrics["exact_match"] == 0.5
