"""The data path as a whole: tokenization, cache, locks, reports, and every message about bad input."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from unit.data_helpers import byte_tokenizer, chats, data_run, exchange, prepared, write_jsonl

from dstune.config.data_schema import DataFormat, OnBadRow, SplitConfig
from dstune.config.schema import CausalLmConfig, ChatConfig, ClassificationConfig, EvaluateConfig
from dstune.data import build, cache, parallel
from dstune.data.collate import NO_TARGET
from dstune.data.tokenize import RowTokenizer
from dstune.errors import Problem, UserError
from dstune.samples import resolve

NOTHING_HELD_OUT = SplitConfig(validation=0.0)


def refusal(config, tokenizer, tmp_path) -> list[Problem]:
    with pytest.raises(UserError) as caught:
        prepared(config, tokenizer, tmp_path / "cache")
    return caught.value.problems


# What comes out


def test_chat_rows_become_samples(tmp_path):
    tokenizer = byte_tokenizer()
    path = write_jsonl(tmp_path / "rows.jsonl", chats(200))
    data = prepared(data_run(path, split=SplitConfig(validation=0.1, test=0.05)), tokenizer, tmp_path / "cache")
    assert data.validation is not None
    assert data.test is not None
    parts = (data.train, data.validation, data.test)
    assert sum(len(part.table) for part in parts) == 200
    texts = set()
    for part in parts:
        for index in range(len(part.table)):
            row = part.table[index]
            assert set(row) == {"input_ids", "labels"}
            assert len(row["input_ids"]) == len(row["labels"]) == part.lengths[index]
            assert row["labels"][0] == NO_TARGET
            targets = [label for label in row["labels"] if label != NO_TARGET]
            assert len(targets) == part.weights[index]
            assert tokenizer.decode(targets).startswith("The answer is ")
            assert targets[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
            texts.add(tokenizer.decode(row["input_ids"]))
    assert len(texts) == 200
    assert data.train.lengths.dtype == np.int32
    assert data.train.weights.dtype == np.int64
    report = data.report["train"]
    assert report["rows_read"] == 200
    assert report["samples"] == report["rows"] == len(data.train.table)
    assert report["tokens"] == data.train.lengths.sum()
    assert report["targets"] == data.train.weights.sum()
    assert report["truncated"] == report["dropped"] == report["bad_rows"] == 0


def test_rows_longer_than_max_length_are_cut_and_rows_without_a_target_dropped(tmp_path):
    tokenizer = byte_tokenizer()
    rows = [exchange("Hi", "Yes"), exchange("Hi", "Hello " * 50), exchange("Hello " * 50, "Yes")]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = prepared(data_run(path, max_length=24, split=NOTHING_HELD_OUT), tokenizer, tmp_path / "cache")
    assert data.report["train"]["truncated"] == 2
    assert data.report["train"]["dropped"] == 1
    assert data.report["train"]["samples"] == 2
    assert data.train.lengths.max() == 24
    whole = RowTokenizer(tokenizer, ChatConfig(), DataFormat.messages, 10_000).samples(rows, [0, 1, 2])[1]
    cut = data.train.table[1]
    assert cut["input_ids"] == whole.input_ids[:24].tolist()
    assert cut["labels"] == whole.labels[:24].tolist()


def test_prompt_and_completion_go_through_the_template(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Hi", "completion": "Yes"}])
    tokenizer = byte_tokenizer()
    data = prepared(data_run(path, split=NOTHING_HELD_OUT), tokenizer, tmp_path / "cache")
    row = data.train.table[0]
    assert (
        tokenizer.decode(row["input_ids"]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    )
    assert tokenizer.decode([label for label in row["labels"] if label != NO_TARGET]) == "Yes<|im_end|>"


def test_prompt_and_completion_without_a_template(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Two and two?", "completion": " four."}])
    tokenizer = byte_tokenizer(None, bos="<s>", eos="</s>")
    data = prepared(data_run(path, split=NOTHING_HELD_OUT), tokenizer, tmp_path / "cache")
    row = data.train.table[0]
    assert tokenizer.decode(row["input_ids"]) == "<s>Two and two? four.</s>"
    assert tokenizer.decode([label for label in row["labels"] if label != NO_TARGET]) == " four.</s>"


def test_documents_are_divided_and_lose_nothing(tmp_path):
    tokenizer = byte_tokenizer(None, bos="<s>", eos="</s>")
    texts = ["Hello how are you? " * 20, "Yes", "<s>no doubled start"]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    config = data_run(path, task=CausalLmConfig(), max_length=16, split=NOTHING_HELD_OUT)
    data = prepared(config, tokenizer, tmp_path / "cache")
    targets: list[int] = []
    for row in data.train.table:
        assert row["labels"][0] == NO_TARGET
        assert row["labels"][1:] == row["input_ids"][1:]
        assert len(row["input_ids"]) <= 16
        targets += row["labels"][1:]
    expected: list[int] = []
    for text in texts:
        expected += tokenizer(text.removeprefix("<s>"), add_special_tokens=False)["input_ids"] + [
            tokenizer.eos_token_id
        ]
    assert targets == expected
    assert data.report["train"]["rows"] == 3
    assert data.report["train"]["truncated"] == 1  # the rows that were divided


def test_pieces_by_hand():
    """Six digits and the end, pieces of 4 that share a token: [1 2 3 4] and [4 5 6 </s>], no piece of the end alone."""
    tokenizer = byte_tokenizer(None, eos="</s>")
    encode = RowTokenizer(tokenizer, CausalLmConfig(), DataFormat.text, 4)
    samples = encode.samples([{"text": "123456"}, {"text": "12"}], [0, 1])
    assert [tokenizer.decode(sample.input_ids) for sample in samples] == ["1234", "456</s>", "12</s>"]
    assert [sample.row for sample in samples] == [0, 0, 1]
    assert not any(sample.problem for sample in samples)


def test_classification(tmp_path):
    rows = [{"text": f"Hello {number}", "label": ["b", "a"][number % 2]} for number in range(40)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"text": "Hello " * 40, "label": "a"}])
    tokenizer = byte_tokenizer(bos="<s>")
    config = data_run(path, task=ClassificationConfig(), max_length=12, split=SplitConfig(validation=0.25))
    data = prepared(config, tokenizer, tmp_path / "cache")
    assert data.labels == ("a", "b")
    assert data.validation is not None
    assert set(data.train.table.column_names) == {"input_ids", "label"}
    assert [sum(label == index for label in data.validation.table["label"]) for index in (0, 1)] == [5, 5]
    assert (data.train.weights == 1).all()
    assert data.train.table[0]["input_ids"][0] == tokenizer.bos_token_id
    truncated = sum(part["truncated"] for part in data.report.values())
    assert truncated == 1
    assert max(data.train.lengths.max(), data.validation.lengths.max()) == 12
    named = prepared(replace(config, task=ClassificationConfig(labels=["b", "a"])), tokenizer, tmp_path / "cache")
    assert named.labels == ("b", "a")
    assert [1 - label for label in named.train.table["label"]] == list(data.train.table["label"])


def test_columns_by_name_from_a_csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("review,stars,id\nnice,5,1\nbad,1,2\nfine,4,3\n")
    config = data_run(
        path, task=ClassificationConfig(), columns={"text": "review", "label": "stars"}, split=NOTHING_HELD_OUT
    )
    assert prepared(config, byte_tokenizer(), tmp_path / "cache").labels == ("1", "4", "5")


def test_max_rows_is_a_constant_sample(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", chats(300))
    tokenizer = byte_tokenizer()
    whole = prepared(data_run(path), tokenizer, tmp_path / "cache")
    fewer = prepared(data_run(path, max_rows=20), tokenizer, tmp_path / "cache")
    more = prepared(data_run(path, max_rows=40), tokenizer, tmp_path / "cache")
    assert whole.validation is not None
    assert fewer.validation is not None
    assert len(fewer.train.table) == 20
    assert whole.validation.table["input_ids"][:] == fewer.validation.table["input_ids"][:]
    texts = [{tuple(ids) for ids in data.train.table["input_ids"]} for data in (fewer, more, whole)]
    assert texts[0] < texts[1] < texts[2]


def test_validation_from_its_own_file(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", chats(30))
    held_out = write_jsonl(tmp_path / "held_out.jsonl", chats(40)[30:])
    data = prepared(data_run(train, validation=str(held_out)), byte_tokenizer(), tmp_path / "cache")
    assert data.validation is not None
    assert (len(data.train.table), len(data.validation.table), data.test) == (30, 10, None)


def test_held_out_rows_come_in_an_order_that_any_beginning_of_is_fair(tmp_path):
    train = [{"text": f"t{number}", "label": "ab"[number % 2]} for number in range(10)]
    by_label = [{"text": f"v{number}", "label": "ab"[number // 100]} for number in range(200)]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", by_label)
    config = data_run(
        write_jsonl(tmp_path / "train.jsonl", train), validation=str(held_out), task=ClassificationConfig()
    )
    validation = prepared(config, byte_tokenizer(), tmp_path / "cache").validation
    assert validation is not None
    assert 20 < sum(validation.table["label"][:80]) < 60


def test_prompts_are_the_same_ones_and_end_where_the_assistant_speaks(tmp_path):
    tokenizer = byte_tokenizer()
    path = write_jsonl(tmp_path / "rows.jsonl", chats(300))
    config = data_run(path, split=SplitConfig(validation=0.2))
    data = prepared(config, tokenizer, tmp_path / "cache")
    assert len(data.prompts) == build.MIN_PROMPTS
    assert len({tuple(prompt.input_ids) for prompt in data.prompts}) == len(data.prompts)
    for prompt in data.prompts:
        assert (
            tokenizer.decode(prompt.input_ids) == f"<|im_start|>user\n{prompt.text}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert prompt.reference.startswith("The answer is ")
    again = prepared(replace(config, evaluate=EvaluateConfig(samples=20)), tokenizer, tmp_path / "cache")
    assert len(again.prompts) == 20
    assert again.prompts[: len(data.prompts)] == data.prompts


def test_prompts_of_texts(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"{number} Hello how are you? " * 5} for number in range(50)])
    tokenizer = byte_tokenizer(None, bos="<s>", eos="</s>")
    config = data_run(path, task=CausalLmConfig(), split=SplitConfig(validation=0.2))
    prompt = prepared(config, tokenizer, tmp_path / "cache").prompts[0]
    assert prompt.input_ids[0] == tokenizer.bos_token_id
    assert len(prompt.input_ids) == 16
    number = prompt.text.split()[0]
    assert (f"{number} Hello how are you? " * 5).startswith(prompt.text + prompt.reference)
    assert len(prompt.reference) > 20


# The cache


def test_the_second_call_reads_the_cache(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", chats(50))
    tokenizer = byte_tokenizer()
    first = prepared(data_run(path), tokenizer, tmp_path / "cache")

    def refuse(self, batch):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(RowTokenizer, "__call__", refuse)
    tokenizer("a call with another setting", truncation=True, max_length=4)  # leaves its mark in the tokenizer
    second = prepared(data_run(path), tokenizer, tmp_path / "cache")
    assert second.fingerprint == first.fingerprint
    assert second.train.table["input_ids"][:] == first.train.table["input_ids"][:]
    assert second.report == first.report
    with pytest.raises(AssertionError, match="tokenized again"):
        prepared(data_run(path, max_length=100), tokenizer, tmp_path / "cache")


def test_the_cache_is_memory_mapped(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", chats(50))
    data = prepared(data_run(path), byte_tokenizer(), tmp_path / "cache")
    (cached,) = data.train.table.cache_files
    assert Path(cached["filename"]).is_relative_to(tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("work"))


DATED = "{{ strftime_now('%Y-%m-%d') }}"


def test_what_makes_another_cache_entry(tmp_path):
    rows = chats(50)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    base, tokenizer = data_run(path), byte_tokenizer()
    dated = byte_tokenizer(DATED + tokenizer.chat_template)

    def key(config=base, tokenizer=tokenizer):
        return prepared(config, tokenizer, tmp_path / "cache").fingerprint

    known = key()
    other_day = replace(base, task=ChatConfig(template_date="2025-03-10"))
    changes = [
        key(replace(base, data=replace(base.data, max_length=64))),
        key(replace(base, data=replace(base.data, split=SplitConfig(seed=1)))),
        key(replace(base, task=ChatConfig(train_on_prompt=True, template_date="2025-03-09"))),
        key(tokenizer=byte_tokenizer(eos="</s>")),
        key(tokenizer=dated),
        key(other_day, dated),
        key(data_run(write_jsonl(tmp_path / "more.jsonl", [*rows, exchange("a", "b")]))),
    ]
    assert len({known, *changes}) == len(changes) + 1
    assert key() == known
    # The date counts only where the template prints it, and a file's name not at all.
    assert key(other_day) == known
    assert key(data_run(write_jsonl(tmp_path / "copy.jsonl", rows))) == known


def test_an_interrupted_entry_is_made_again(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", chats(50))
    with monkeypatch.context() as patched:

        def die(*arguments, **settings):
            raise KeyboardInterrupt

        patched.setattr(build, "write_samples", die)
        with pytest.raises(KeyboardInterrupt):
            prepared(data_run(path), byte_tokenizer(), tmp_path / "cache")
    fingerprint = prepared(data_run(path), byte_tokenizer(), tmp_path / "cache").fingerprint
    # As a process that was killed leaves it: half an entry under the other name.
    folder = tmp_path / "cache" / "data" / fingerprint
    folder.rename(folder.with_suffix(".incomplete"))
    (folder.with_suffix(".incomplete") / "train.arrow").write_bytes(b"half")
    assert len(prepared(data_run(path), byte_tokenizer(), tmp_path / "cache").train.table) > 40
    assert not folder.with_suffix(".incomplete").exists()


def _make(root: Path, log: Path, seconds: float) -> None:
    def make(folder: Path) -> None:
        with log.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        (folder / "content").write_text("whole")

    assert (cache.entry(root, "key", make) / "content").read_text() == "whole"


def _process(*arguments):
    process = multiprocessing.get_context("fork").Process(target=_make, args=arguments)
    process.start()
    return process


def test_processes_at_once_make_an_entry_once(tmp_path):
    log = tmp_path / "log"
    processes = [_process(tmp_path / "cache", log, 0.5) for _ in range(4)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(log.read_text().split()) == 1


def test_those_who_wait_say_so(tmp_path, monkeypatch, caplog):
    log = tmp_path / "log"
    maker = _process(tmp_path / "cache", log, 1.0)
    while not log.exists():
        time.sleep(0.02)
    monkeypatch.setattr(cache, "POLL_SECONDS", 0.2)
    _make(tmp_path / "cache", log, 0.0)
    maker.join(60)
    assert "waiting for another process that prepares the data" in caplog.text


def test_a_killed_maker_is_followed_by_the_next(tmp_path, monkeypatch):
    log = tmp_path / "log"
    maker = _process(tmp_path / "cache", log, 60.0)
    while not log.exists():
        time.sleep(0.02)
    monkeypatch.setattr(cache, "POLL_SECONDS", 0.2)
    waiting = _process(tmp_path / "cache", log, 0.0)
    time.sleep(0.5)
    assert waiting.is_alive()
    assert maker.pid is not None
    os.kill(maker.pid, signal.SIGKILL)
    waiting.join(60)
    maker.join(60)
    assert waiting.exitcode == 0
    assert len(log.read_text().split()) == 2


def _failing(root: Path, log: Path, seen: Path) -> None:
    def make(folder: Path) -> None:
        with log.open("a") as stream:
            stream.write("made\n")
        time.sleep(0.5)
        raise UserError(Problem(where="rows.jsonl:3", reason="broken"))

    try:
        cache.entry(root, "key", make)
    except UserError as error:
        with seen.open("a") as stream:
            stream.write(str(error) + "\n")


def test_those_who_waited_get_the_makers_error(tmp_path):
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "cache", tmp_path / "log", tmp_path / "seen")
    processes = [context.Process(target=_failing, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert (tmp_path / "seen").read_text().splitlines() == ["rows.jsonl:3: broken"] * 3
    assert (tmp_path / "log").read_text().splitlines() == ["made"]
    # A later call does not trust it: the file may have been mended under the same name, or the code.
    _failing(*arguments)
    assert len((tmp_path / "log").read_text().splitlines()) == 2


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    config = data_run(write_jsonl(tmp_path / "rows.jsonl", chats(5)))
    with pytest.raises(UserError, match="DSTUNE_CACHE"):
        prepared(config, byte_tokenizer(), tmp_path / "cache")


def test_several_processes_give_the_same_samples(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", [*chats(120), *[{"messages": []}] * 2])
    config = data_run(path, on_bad_row=OnBadRow.skip, workers=3, max_length=20)
    alone = prepared(config, byte_tokenizer(), tmp_path / "alone")
    monkeypatch.setattr(parallel, "MIN_ROWS_FOR_PROCESSES", 2)
    monkeypatch.setattr(parallel, "MIN_ROWS_PER_PROCESS", 2)
    several = prepared(config, byte_tokenizer(), tmp_path / "several")
    assert alone.report == several.report
    assert alone.train.table["input_ids"][:] == several.train.table["input_ids"][:]
    assert alone.train.table["labels"][:] == several.train.table["labels"][:]
    assert (alone.train.weights == several.train.weights).all()


# Bad input


def test_missing_files_of_all_parts_are_named_together(tmp_path):
    config = data_run(tmp_path / "absent.jsonl", validation=str(tmp_path / "gone-*.csv"))
    problems = refusal(config, byte_tokenizer(), tmp_path)
    assert [(problem.where, problem.reason) for problem in problems] == [
        ("data.train", "no such file"),
        ("data.validation", "no file matches"),
    ]


def test_no_training_data(tmp_path):
    config = data_run("x")
    config = replace(config, data=replace(config.data, train=None))
    (problem,) = refusal(config, byte_tokenizer(), tmp_path)
    assert (problem.where, problem.reason) == ("data.train", "no training data given")


def test_a_header_without_rows(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n")
    (problem,) = refusal(data_run(tmp_path / "rows.csv", task=ClassificationConfig()), byte_tokenizer(), tmp_path)
    assert (problem.where, problem.reason) == (str(tmp_path / "rows.csv"), "holds no rows")


def test_bad_rows_are_listed_together_with_their_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(exchange("a", "b"))
    roles = json.dumps({"messages": [{"role": "bot", "content": "a"}]})
    surrogate = '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "b"}]}'
    path.write_text("\n".join([good, "{broken", roles, surrogate, '{"text": "a"}', *["[]"] * 9, good]))
    problems = refusal(data_run(path), byte_tokenizer(), tmp_path)
    assert [problem.where for problem in problems] == [f"{path}:{line}" for line in range(2, 12)]
    reasons = [problem.reason for problem in problems]
    for part, reason in zip(
        ["broken JSON", "unknown role 'bot'", "surrogate", "missing column 'messages'"], reasons, strict=False
    ):
        assert part in reason
    assert reasons[-1].endswith("(and 3 more bad rows)")
    assert "data.on_bad_row=skip" in problems[-1].fix


def test_bad_rows_are_counted_if_they_are_to_be_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*[json.dumps(row) for row in chats(20)], "{broken", '{"messages": []}']))
    config = data_run(path, on_bad_row=OnBadRow.skip, split=NOTHING_HELD_OUT)
    report = prepared(config, byte_tokenizer(), tmp_path / "cache").report["train"]
    assert (report["rows_read"], report["samples"], report["bad_rows"]) == (22, 20, 2)
    assert [example["place"] for example in report["examples"]["bad_rows"]] == [f"{path}:21", f"{path}:22"]
    path.write_text("{broken\n")
    (problem,) = refusal(config, byte_tokenizer(), tmp_path)
    assert (problem.where, problem.value) == ("data.train", str(path))
    assert "no row is left" in problem.reason


def test_a_row_that_the_template_refuses_is_named(tmp_path):
    template = "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('bad it is') }}{% endif %}"
    tokenizer = byte_tokenizer(template + byte_tokenizer().chat_template)
    path = write_jsonl(tmp_path / "rows.jsonl", [exchange("a", "b"), exchange("bad", "b"), exchange("c", "d")])
    (problem,) = refusal(data_run(path, split=NOTHING_HELD_OUT), tokenizer, tmp_path)
    assert problem.where == f"{path}:2"
    assert "the chat template refuses this conversation: bad it is" in problem.reason
    skipping = data_run(path, split=NOTHING_HELD_OUT, on_bad_row=OnBadRow.skip)
    report = prepared(skipping, tokenizer, tmp_path / "cache").report["train"]
    assert (report["samples"], report["bad_rows"]) == (2, 1)


def test_no_trainable_token(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [exchange("a", "b"), {"messages": [{"role": "user", "content": "a"}]}])
    (problem,) = refusal(data_run(path), byte_tokenizer(), tmp_path)
    assert problem.where == f"{path}:2"
    assert problem.reason.startswith("no trainable token")
    nothing_marked = byte_tokenizer(byte_tokenizer().chat_template + "{% generation %}{% endgeneration %}")
    path = write_jsonl(tmp_path / "marks.jsonl", [exchange("a", "b")])
    (problem,) = refusal(data_run(path, split=NOTHING_HELD_OUT), nothing_marked, tmp_path)
    assert (problem.where, problem.reason) == (f"{path}:1", "no trainable token")


def test_everything_longer_than_max_length(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [exchange("Hello " * 30, "b"), exchange("Hello " * 40, "b")])
    (problem,) = refusal(data_run(path, max_length=8, split=NOTHING_HELD_OUT), byte_tokenizer(), tmp_path)
    assert (problem.where, problem.value) == ("data.max_length", "8")
    assert "no train row has a trainable token among its first 8 tokens" in problem.reason


def test_labels_unseen_in_training(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [{"text": "v", "label": "a"}, {"text": "w", "label": "c"}])
    config = data_run(train, validation=str(held_out), task=ClassificationConfig())
    (problem,) = refusal(config, byte_tokenizer(), tmp_path)
    assert problem.where == f"{held_out}:2"
    assert problem.reason == "label 'c' does not occur in the training rows (a, b)"
    skipping = replace(config, data=replace(config.data, on_bad_row=OnBadRow.skip))
    data = prepared(skipping, byte_tokenizer(), tmp_path / "cache")
    assert data.report["validation"]["bad_rows"] == 1
    assert data.report["validation"]["samples"] == 1
    named = replace(config, task=ClassificationConfig(labels=["a", "x"]))
    assert [problem.reason for problem in refusal(named, byte_tokenizer(), tmp_path)] == [
        "label 'b' is not among task.labels (a, x)",
        "label 'c' is not among task.labels (a, x)",
    ]


def test_one_label_only(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "x", "label": "a"}, {"text": "y", "label": "a"}])
    (problem,) = refusal(data_run(path, task=ClassificationConfig()), byte_tokenizer(), tmp_path)
    assert problem.where == "data.train"
    assert problem.reason == "the training rows have one label only ('a')"


def test_a_model_without_chat_template(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", chats(5))
    (problem,) = refusal(data_run(path), byte_tokenizer(None), tmp_path)
    assert problem.where == "model.chat_template"
    assert "set model.chat_template" in problem.fix


def test_a_model_without_an_end_of_sequence_token(tmp_path):
    tokenizer = byte_tokenizer(None)
    tokenizer.eos_token = None
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "Hello"}])
    (problem,) = refusal(data_run(path, task=CausalLmConfig(), split=NOTHING_HELD_OUT), tokenizer, tmp_path)
    assert problem.where == "model.path"


# The real thing


@pytest.fixture(scope="module")
def smollm2():
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve("sample://smollm2", fetch=False)), resolve(
            "sample://chitchat", fetch=False
        )
    except UserError:
        pytest.skip("needs the sample model and dialogues: dstune samples smollm2 chitchat")


def test_the_sample_dialogues(smollm2, tmp_path):
    """SmolLM2 on 200 dialogues: every assistant turn and its end are trained, nothing else is, and rows are full."""
    tokenizer, dialogues = smollm2
    rows = [json.loads(line) for line in dialogues.read_text().splitlines()[:200]]
    encode = RowTokenizer(tokenizer, ChatConfig(), DataFormat.messages, 1_000_000)
    for row, sample in zip(rows, encode.samples(rows, list(range(len(rows)))), strict=True):
        expected = []
        for message in row["messages"]:
            if message["role"] == "assistant":
                expected += tokenizer(message["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        assert sample.labels[sample.labels != NO_TARGET].tolist() == expected
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = prepared(data_run(path, max_length=512), tokenizer, tmp_path / "cache")
    from dstune.data.sampler import TrainingOrder

    order = TrainingOrder(
        data.train.lengths,
        data.train.weights,
        micro_batch_size=2,
        global_batch_size=8,
        max_length=512,
        packing=True,
        length_grouping=False,
        seed=0,
    )
    assert order.efficiency(0) > 0.97
