"""Rows of preferences: brought to one shape, or refused with file and line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from unit.data_helpers import byte_tokenizer, data_run, prepared, write_jsonl

from dstune.config.data_schema import SplitConfig
from dstune.core.errors import UserError
from dstune.data.batches import batch_of
from dstune.data.rows import RowError, normalise
from dstune.data.sampler import MicroBatch
from dstune.tasks.preference.config import PreferenceConfig, PreferenceLoss


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def pair(**fields):
    return normalise(fields, "preference", {})


def test_prompt_of_two_conversations_is_what_they_have_in_common():
    begun = [user("a"), assistant("b"), user("c")]
    row = pair(chosen=[*begun, assistant("good")], rejected=[*begun, assistant("bad")])
    assert row == {"prompt": begun, "chosen": [assistant("good")], "rejected": [assistant("bad")]}
    # A prompt beside whole conversations (as in UltraFeedback) says it once more.
    assert pair(prompt="a", chosen=[*begun, assistant("good")], rejected=[*begun, assistant("bad")]) == row


def test_texts_stay_texts_and_mix_with_messages():
    assert pair(prompt="a", chosen="b", rejected="c", margin=2) == {
        "prompt": "a",
        "chosen": "b",
        "rejected": "c",
        "margin": 2.0,
    }
    mixed = pair(prompt="a", chosen="b", rejected=[assistant("c")], system="be brief")
    assert mixed["prompt"] == [{"role": "system", "content": "be brief"}, user("a")]
    assert mixed["chosen"] == [assistant("b")]


def test_silence_may_be_rejected_and_not_chosen():
    without_answer, with_answer = [user("a"), assistant("")], [user("a"), assistant("b")]
    assert pair(chosen=with_answer, rejected=without_answer)["rejected"] == [assistant("")]
    with pytest.raises(RowError, match=r"message 2 \(assistant\) is empty"):
        pair(chosen=without_answer, rejected=with_answer)
    judged = {"prompt": [user("a")], "completion": [assistant("")], "label": False}
    assert normalise(judged, "feedback", {})["desirable"] is False
    with pytest.raises(RowError, match=r"message 2 \(assistant\) is empty"):
        normalise(judged | {"label": True}, "feedback", {})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"chosen": "b", "rejected": "c"}, "no column 'prompt'"),
        ({"prompt": "a", "chosen": " ", "rejected": "c"}, "column 'chosen' is empty"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]}, "different messages"),
        (
            {
                "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
                "rejected": [user("a"), assistant("b"), user("x"), assistant("d")],
            },
            "differ before the assistant answers: message 3 of chosen has the role user",
        ),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b"), user("c")]},
            "chosen ends where the other one goes on",
        ),
        ({"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [user("a"), assistant("c")]}, "one of chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"}, "'margin' must be a number"),
    ],
)
def test_bad_pairs_say_why(fields, reason):
    with pytest.raises(RowError, match=reason):
        pair(**fields)


@pytest.mark.parametrize(("value", "verdict"), [(True, True), (0, False), ("false", False), ("1", True)])
def test_verdict_of_an_answer(value, verdict):
    row = normalise({"prompt": "a", "completion": "b", "label": value}, "feedback", {})
    assert row == {"prompt": "a", "completion": "b", "desirable": verdict}


def test_a_verdict_is_true_or_false():
    with pytest.raises(RowError, match="must be true"):
        normalise({"prompt": "a", "completion": "b", "label": "great"}, "feedback", {})


PAIRS = [{"prompt": f"q{number}", "chosen": f"good {number}", "rejected": f"bad one {number}"} for number in range(4)]
NOTHING_HELD_OUT = SplitConfig(validation=0.0)


def run(path, loss=PreferenceLoss.dpo, **data):
    task = PreferenceConfig(loss=loss, template_date="2025-03-09")
    return data_run(path, task=task, packing=False, split=NOTHING_HELD_OUT, **data)


def test_a_pair_is_one_sample_with_both_answers(tmp_path):
    tokenizer = byte_tokenizer()
    data = prepared(run(write_jsonl(tmp_path / "pairs.jsonl", PAIRS)), tokenizer, tmp_path / "cache")
    sample = data.train.sample(1)
    for answer, text in (("", "good 1"), ("rejected_", "bad one 1")):
        ids, labels = sample[f"{answer}input_ids"], sample[f"{answer}labels"]
        assert tokenizer.decode(ids).startswith(tokenizer.decode(sample["input_ids"])[:5])
        assert text in tokenizer.decode(ids[labels != -100])
        assert "q1" not in tokenizer.decode(ids[labels != -100])
    both = len(sample["input_ids"]) + len(sample["rejected_input_ids"])
    assert (data.train.weights[1], data.train.lengths[1]) == (1, both)


def test_pairs_are_judged_answers_too(tmp_path):
    tokenizer = byte_tokenizer()
    config = run(write_jsonl(tmp_path / "pairs.jsonl", PAIRS), PreferenceLoss.kto)
    data = prepared(config, tokenizer, tmp_path / "cache")
    assert [int(data.train.sample(number)["desirable"]) for number in range(8)] == [1, 0] * 4
    assert np.array_equal(data.train.weights, [1] * 8)
    # The reference point of KTO is one of answers to other prompts: never the other answer of the same pair.
    batch = batch_of(config, data.train, MicroBatch(0, tuple((number,) for number in range(8))), 0)
    for number, (ids, labels) in enumerate(zip(batch["other_input_ids"], batch["other_labels"], strict=True)):
        assert f"q{number // 2}" in tokenizer.decode(ids)
        kind = ("good", "bad one")[number % 2]
        assert f"{kind} {(number // 2 + 1) % 4}" in tokenizer.decode(ids[labels != -100])


def test_a_pair_that_differs_behind_max_length_only_is_dropped(tmp_path):
    rows = [*PAIRS, {"prompt": "q", "chosen": "x" * 80 + "a", "rejected": "x" * 80 + "b"}]
    config = run(write_jsonl(tmp_path / "pairs.jsonl", rows), max_length=64)
    data = prepared(config, byte_tokenizer(), tmp_path / "cache")
    assert (len(data.train.lengths), data.report["train"]["dropped"]) == (4, 1)


def test_bad_rows_are_named_by_file_and_line(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [*PAIRS, {"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(UserError) as caught:
        prepared(run(path), byte_tokenizer(), tmp_path / "cache")
    (problem,) = caught.value.problems
    assert (problem.where, problem.reason) == (f"{path}:5", "chosen and rejected are the same")


def test_columns_of_pairs_point_to_the_task(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    with pytest.raises(UserError) as caught:
        prepared(data_run(path), byte_tokenizer(), tmp_path / "cache")
    assert "task=preference" in json.dumps([problem.fix for problem in caught.value.problems])
