"""What the data path refuses, each with file and line or key."""

from __future__ import annotations

import json
from dataclasses import replace

from unit.data_helpers import byte_tokenizer, chats, data_run, exchange, prepared, refusal_of, write_jsonl

from dstune.config.data_schema import OnBadRow, SplitConfig
from dstune.tasks.causal_lm.config import CausalLmConfig
from dstune.tasks.classification.config import ClassificationConfig

NOTHING_HELD_OUT = SplitConfig(validation=0.0)


def test_missing_files_of_all_parts_are_named_together(tmp_path):
    config = data_run(tmp_path / "absent.jsonl", validation=str(tmp_path / "gone-*.csv"))
    problems = refusal_of(config, byte_tokenizer(), tmp_path)
    assert [(problem.where, problem.reason) for problem in problems] == [
        ("data.train", "no such file"),
        ("data.validation", "no file matches"),
    ]


def test_no_training_data(tmp_path):
    config = data_run("x")
    config = replace(config, data=replace(config.data, train=None))
    (problem,) = refusal_of(config, byte_tokenizer(), tmp_path)
    assert (problem.where, problem.reason) == ("data.train", "no training data given")


def test_a_header_without_rows(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n")
    (problem,) = refusal_of(data_run(tmp_path / "rows.csv", task=ClassificationConfig()), byte_tokenizer(), tmp_path)
    assert (problem.where, problem.reason) == (str(tmp_path / "rows.csv"), "holds no rows")


def test_bad_rows_are_listed_together_with_their_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(exchange("a", "b"))
    roles = json.dumps({"messages": [{"role": "bot", "content": "a"}]})
    surrogate = '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "b"}]}'
    path.write_text("\n".join([good, "{broken", roles, surrogate, '{"text": "a"}', *["[]"] * 9, good]))
    problems = refusal_of(data_run(path), byte_tokenizer(), tmp_path)
    assert [problem.where for problem in problems] == [f"{path}:{line}" for line in range(2, 12)]
    reasons = [problem.reason for problem in problems]
    for part, reason in zip(
        ["broken JSON", "unknown role 'bot'", "surrogate", "missing column 'messages'"], reasons, strict=False
    ):
        assert part in reason
    assert reasons[-1].endswith("(and 3 more bad rows, 13 in all)")
    assert "data.on_bad_row=skip" in problems[-1].fix


def test_bad_rows_are_counted_if_they_are_to_be_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*[json.dumps(row) for row in chats(20)], "{broken", '{"messages": []}']))
    config = data_run(path, on_bad_row=OnBadRow.skip, split=NOTHING_HELD_OUT)
    report = prepared(config, byte_tokenizer(), tmp_path / "cache").report["train"]
    assert (report["rows_read"], report["samples"], report["bad_rows"]) == (22, 20, 2)
    assert [example["place"] for example in report["examples"]["bad_rows"]] == [f"{path}:21", f"{path}:22"]
    path.write_text("{broken\n")
    (problem,) = refusal_of(config, byte_tokenizer(), tmp_path)
    assert (problem.where, problem.value) == ("data.train", str(path))
    assert "no row is left" in problem.reason


def test_a_row_that_the_template_refuses_is_named(tmp_path):
    template = "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('bad it is') }}{% endif %}"
    tokenizer = byte_tokenizer(template + byte_tokenizer().chat_template)
    path = write_jsonl(tmp_path / "rows.jsonl", [exchange("a", "b"), exchange("bad", "b"), exchange("c", "d")])
    (problem,) = refusal_of(data_run(path, split=NOTHING_HELD_OUT), tokenizer, tmp_path)
    assert problem.where == f"{path}:2"
    assert "the chat template refuses this conversation: bad it is" in problem.reason
    skipping = data_run(path, split=NOTHING_HELD_OUT, on_bad_row=OnBadRow.skip)
    report = prepared(skipping, tokenizer, tmp_path / "cache").report["train"]
    assert (report["samples"], report["bad_rows"]) == (2, 1)


def test_no_trainable_token(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [exchange("a", "b"), {"messages": [{"role": "user", "content": "a"}]}])
    (problem,) = refusal_of(data_run(path), byte_tokenizer(), tmp_path)
    assert problem.where == f"{path}:2"
    assert problem.reason.startswith("no trainable token")
    nothing_marked = byte_tokenizer(byte_tokenizer().chat_template + "{% generation %}{% endgeneration %}")
    path = write_jsonl(tmp_path / "marks.jsonl", [exchange("a", "b")])
    (problem,) = refusal_of(data_run(path, split=NOTHING_HELD_OUT), nothing_marked, tmp_path)
    assert (problem.where, problem.reason) == (f"{path}:1", "no trainable token")


def test_everything_longer_than_max_length(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [exchange("Hello " * 30, "b"), exchange("Hello " * 40, "b")])
    (problem,) = refusal_of(data_run(path, max_length=8, split=NOTHING_HELD_OUT), byte_tokenizer(), tmp_path)
    assert (problem.where, problem.value) == ("data.max_length", "8")
    assert "no train row has a trainable token among its first 8 tokens" in problem.reason


def test_labels_unseen_in_training(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [{"text": "v", "label": "a"}, {"text": "w", "label": "c"}])
    config = data_run(train, validation=str(held_out), task=ClassificationConfig())
    (problem,) = refusal_of(config, byte_tokenizer(), tmp_path)
    assert problem.where == f"{held_out}:2"
    assert problem.reason == "label 'c' does not occur in the training rows (a, b)"
    skipping = replace(config, data=replace(config.data, on_bad_row=OnBadRow.skip))
    data = prepared(skipping, byte_tokenizer(), tmp_path / "cache")
    assert data.report["validation"]["bad_rows"] == 1
    assert data.report["validation"]["samples"] == 1
    named = replace(config, task=ClassificationConfig(labels=["a", "x"]))
    assert [problem.reason for problem in refusal_of(named, byte_tokenizer(), tmp_path)] == [
        "label 'b' is not among task.labels (a, x)",
        "label 'c' is not among task.labels (a, x)",
    ]


def test_one_label_only(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "x", "label": "a"}, {"text": "y", "label": "a"}])
    (problem,) = refusal_of(data_run(path, task=ClassificationConfig()), byte_tokenizer(), tmp_path)
    assert problem.where == "data.train"
    assert problem.reason == "the training rows have one label only ('a')"


def test_a_model_without_chat_template(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", chats(5))
    (problem,) = refusal_of(data_run(path), byte_tokenizer(None), tmp_path)
    assert problem.where == "model.chat_template"
    assert "set model.chat_template" in problem.fix


def test_a_model_without_an_end_of_sequence_token(tmp_path):
    tokenizer = byte_tokenizer(None)
    tokenizer.eos_token = None
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "Hello"}])
    (problem,) = refusal_of(data_run(path, task=CausalLmConfig(), split=NOTHING_HELD_OUT), tokenizer, tmp_path)
    assert problem.where == "model.path"
