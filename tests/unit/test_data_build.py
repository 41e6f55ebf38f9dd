"""The data path as a whole: what becomes of rows of each kind."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from unit.data_helpers import byte_tokenizer, chats, data_run, exchange, prepared, write_jsonl

from dstune.config.data_schema import SplitConfig
from dstune.config.schema import EvaluateConfig
from dstune.core.errors import UserError
from dstune.data.collate import NO_TARGET
from dstune.data.prompts import MIN_PROMPTS
from dstune.data.tokenize import RowTokenizer
from dstune.samples import resolve
from dstune.tasks.causal_lm.config import CausalLmConfig
from dstune.tasks.chat.config import ChatConfig
from dstune.tasks.classification.config import ClassificationConfig
from dstune.tasks.seq2seq.config import Seq2SeqConfig

NOTHING_HELD_OUT = SplitConfig(validation=0.0)


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
            assert set(row) == {"input_ids", "labels", "bytes"}
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


def test_rows_are_distinguished_by_what_they_say(tmp_path):
    """Not by their lengths and targets alone: a run is not continued on others."""

    def content(name: str, word: str, label: str) -> str:
        rows = [{"text": f"one {word}", "label": "a"}, {"text": "two", "label": "b"}, {"text": "three", "label": label}]
        path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        config = data_run(path, task=ClassificationConfig(), split=NOTHING_HELD_OUT)
        return prepared(config, byte_tokenizer(), tmp_path / "cache").train.content

    first = content("first", "red", "a")
    assert content("again", "red", "a") == first
    assert content("word", "bad", "a") != first
    assert content("label", "red", "b") != first


def test_their_digest_does_not_depend_on_who_tokenizes_them(tmp_path):
    """From 2,000 rows on they are shared out to processes, whose batches end elsewhere; texts are in it too."""
    rows = [{"source": f"one {number}", "target": "x" * (number % 7 + 1)} for number in range(2100)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = [
        prepared(
            data_run(path, task=Seq2SeqConfig(), split=NOTHING_HELD_OUT, packing=False, workers=workers),
            byte_tokenizer(),
            tmp_path / f"cache-{workers}",
        ).train.content
        for workers in (1, 2)
    ]
    assert "source=" in found[0]
    assert found[0] == found[1]


def test_rows_longer_than_max_length_are_cut_and_rows_without_a_target_dropped(tmp_path):
    tokenizer = byte_tokenizer()
    rows = [exchange("Hi", "Yes"), exchange("Hi", "Hello " * 50), exchange("Hello " * 50, "Yes")]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = prepared(data_run(path, max_length=24, split=NOTHING_HELD_OUT), tokenizer, tmp_path / "cache")
    assert data.report["train"]["truncated"] == 2
    assert data.report["train"]["dropped"] == 1
    assert data.report["train"]["samples"] == 2
    assert data.train.lengths.max() == 24
    whole = RowTokenizer(tokenizer, ChatConfig(), "messages", 10_000).samples(rows, [0, 1, 2])[1]
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
    encode = RowTokenizer(tokenizer, CausalLmConfig(), "text", 4)
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
    assert len(data.prompts) == MIN_PROMPTS
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
    encode = RowTokenizer(tokenizer, ChatConfig(), "messages", 1_000_000)
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
    assert order.efficiency() > 0.97
