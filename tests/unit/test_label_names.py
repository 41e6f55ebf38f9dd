"""Labels that look like a slip are listed, or refused."""

from __future__ import annotations

import pytest
from unit.data_helpers import byte_tokenizer, data_run, prepared, refusal_of, write_jsonl

from dstune.config.data_schema import OnSuspiciousLabels, SplitConfig
from dstune.data.label_names import suspicious
from dstune.tasks.classification.config import ClassificationConfig


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        ({"bug": 56, "Bug": 2}, ["the labels 'Bug' (2 training rows) and 'bug' (56 training rows) differ by case only"]),
        ({"not good": 5, "not_good": 3}, ["'not_good' (3 training rows) and 'not good' (5 training rows) differ by white"]),
        ({"billing": 63, "billling": 2}, ["differ by one character only"]),
        ({"positive": 5, "postive": 4, "negative": 9}, ["'postive' (4 training rows) and 'positive'"]),
        ({"positive": 5, "psoitive": 4}, ["differ by one character only"]),
        ({"very positive": 5, "very pozitive": 4}, ["differ by one character only"]),
        ({"ﬁnance": 5, "finance": 4}, ["differ by the form of a character only"]),
        ({"B-PER": 4, "I-PER": 9, "B-per": 2, "O": 100}, ["'per' (2 training rows) and 'PER' (13 training rows)"]),
        ({"pos": 9, "neg": 1}, ["the label 'neg' has one training row"]),
        ({"cat": 3, "bat": 4, "class1": 3, "class10": 3, "class_a": 2, "class_b": 2, "yes": 2, "no": 2}, []),
        ({"positive": 5, "negative": 5, "never seen": 0}, []),
    ],
)  # fmt: skip
def test_slips(counts, found):
    listed = suspicious(counts)
    assert len(listed) == len(found), listed
    assert all(part in sentence for part, sentence in zip(found, listed, strict=True))


def test_thousands_of_labels_are_compared_in_no_time():
    counts = {f"{'abcdefghij'[number % 10]}{number} label of {number * 7919 % 6007}": 2 for number in range(3000)}
    assert suspicious({**counts, "international": 9, "internationa": 2}) == [
        "the labels 'internationa' (2 training rows) and 'international' (9 training rows) differ by one character only"
    ]


def test_suspicious_labels_are_refused_where_the_run_says_so(tmp_path):
    rows = [{"text": f"row {number}", "label": "bug" if number % 2 else "account"} for number in range(8)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"text": "odd", "label": "Bug"}])
    config = data_run(path, task=ClassificationConfig(), packing=False, split=SplitConfig(validation=0.0))
    data = prepared(config, byte_tokenizer(), tmp_path / "cache")
    assert data.report["train"]["labels"] == {"Bug": 1, "account": 4, "bug": 4}
    strict = data_run(
        path,
        task=ClassificationConfig(),
        packing=False,
        split=SplitConfig(validation=0.0),
        on_suspicious_labels=OnSuspiciousLabels.error,
    )
    problems = refusal_of(strict, byte_tokenizer(), tmp_path)  # what is prepared already is looked at too
    assert [problem.reason for problem in problems] == [
        "the labels 'Bug' (1 training row) and 'bug' (4 training rows) differ by case only",
        "the label 'Bug' has one training row",
    ]
