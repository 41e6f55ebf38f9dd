"""Rows that are token ids already: read where the format and the tokenizer are named, and trained as they are."""

from __future__ import annotations

import pytest
from unit.data_helpers import byte_tokenizer, data_run, prepared, refusal_of, write_jsonl

from dstune.config.compose import compose
from dstune.config.data_schema import SplitConfig
from dstune.config.validate import find_problems
from dstune.core.errors import UserError
from dstune.data.collate import NO_TARGET
from dstune.data.formats import recognise
from dstune.tasks.causal_lm.config import CausalLmConfig
from dstune.tasks.chat.config import ChatConfig

TEXT = CausalLmConfig()
NOTHING_HELD_OUT = SplitConfig(validation=0.0)


def run(path, **data):
    return data_run(path, task=TEXT, split=NOTHING_HELD_OUT, format="tokens", tokenizer="sample://smollm2", **data)


def test_ids_are_trained_as_they_are(tmp_path):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, {"input_ids": [8, 9], "attention_mask": [1, 1]}]
    data = prepared(run(write_jsonl(tmp_path / "rows.jsonl", rows)), byte_tokenizer(), tmp_path / "cache")
    assert data.train.table["input_ids"][:] == [[5, 6, 7], [8, 9]]
    assert data.train.table["labels"][:] == [[NO_TARGET, NO_TARGET, 7], [NO_TARGET, 9]]
    assert data.train.weights.tolist() == [1, 1]


def test_long_rows_become_pieces_and_no_target_is_lost(tmp_path):
    ids = list(range(20, 40))
    path = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": ids, "labels": [*[-100] * 9, *ids[9:]]}])
    table = prepared(run(path, max_length=8), byte_tokenizer(), tmp_path / "cache").train.table
    targets = [label for labels in table["labels"][:] for label in labels if label != NO_TARGET]
    assert targets == ids[9:] and len(table) == 2  # the piece without a target is left out


def test_an_id_of_more_than_64_bits_is_a_bad_row(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": [5, 6]}, {"input_ids": [5, 2**64 - 1]}])
    (problem,) = refusal_of(run(path), byte_tokenizer(), tmp_path)
    assert problem.where == f"{path}:2" and "whole numbers of 64 bits, one is 18446744073709551615" in problem.reason


def test_equal_rows_are_found_and_different_ones_kept(tmp_path):
    train = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in ([5, 6], [5, 6], [7, 8], [9, 9])])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [{"input_ids": [7, 8]}])
    data = prepared(run(train, validation=str(held_out)), byte_tokenizer(), tmp_path / "cache")
    assert data.train.table["input_ids"][:] == [[5, 6], [9, 9]]
    assert [prompt.input_ids for prompt in data.prompts] == [[7]]


@pytest.mark.parametrize("task", [TEXT, ChatConfig()])
def test_ids_are_not_read_where_the_format_is_not_named(task):
    with pytest.raises(UserError, match=r"(?s)task=causal_lm data\.format=tokens data\.tokenizer=NAME and"):
        recognise({"input_ids": [1], "labels": [1]}, {}, "auto", task, "rows.jsonl:1")


def test_another_tokenizer_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": [5, 6, 7]}])
    byte_tokenizer().save_pretrained(tmp_path / "same")
    other = byte_tokenizer()
    other.add_tokens(["another"])
    other.save_pretrained(tmp_path / "other")
    config = data_run(path, task=TEXT, split=NOTHING_HELD_OUT, format="tokens", tokenizer=str(tmp_path / "same"))
    assert len(prepared(config, byte_tokenizer(), tmp_path / "cache").train.table) == 1
    config = data_run(path, task=TEXT, split=NOTHING_HELD_OUT, format="tokens", tokenizer=str(tmp_path / "other"))
    (problem,) = refusal_of(config, byte_tokenizer(), tmp_path)
    assert problem.where == "data.tokenizer" and "in 1 tokens, for example 'another' is 356 in " in problem.reason
    config = data_run(path, task=TEXT, split=NOTHING_HELD_OUT, format="tokens", tokenizer=str(tmp_path / "none"))
    (problem,) = refusal_of(config, byte_tokenizer(), tmp_path)
    assert problem.where == "data.tokenizer" and "cannot be loaded" in problem.reason


def problems(*overrides: str, rows: str = "data.train=rows.jsonl") -> list[str]:
    config = compose(["task=causal_lm", "model=smollm2", rows, *overrides]).config
    return [problem.where for problem in find_problems(config)]


def test_what_goes_with_token_ids():
    assert problems("data.format=tokens") == ["data.tokenizer"]
    assert problems("data.tokenizer=org/name") == ["data.tokenizer"]
    named = ("data.format=tokens", "data.tokenizer=sample://smollm2")
    assert problems(*named) == []
    assert problems(*named, "data.clean.secrets=mask", "data.clean.duplicates=near") == [
        "data.clean.secrets",
        "data.clean.duplicates",
    ]


def test_token_ids_do_not_stand_beside_texts():
    mixture = "data.mixture={a: {path: a.jsonl}, b: {path: b.jsonl, format: %s}}"
    named = "data.tokenizer=sample://smollm2"
    assert problems(named, rows=mixture % "tokens") == ["data.mixture.b.format"]
    assert problems(named, "data.format=tokens", rows=mixture % "text") == ["data.mixture.a.format"]
    assert problems(named, "data.format=tokens", rows=mixture % "tokens") == []
    both = "data.mixture={a: {path: a.jsonl, format: text}, b: {path: b.jsonl, format: text}}"
    assert problems(named, "data.format=tokens", "data.validation=c.jsonl", rows=both) == ["data.format"]
