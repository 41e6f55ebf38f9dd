"""Sources and targets: rows, tokens, batches, what evaluation costs, worked examples, and the sample of verses."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.configs import run_config
from transformers import M2M100Config, M2M100ForConditionalGeneration
from unit.data_helpers import byte_tokenizer, data_run, prepared, write_jsonl

from dstune.config.architectures import mark_encoder_decoder
from dstune.config.data_schema import DataConfig, SplitConfig
from dstune.config.schema import EarlyStoppingConfig, EvaluateConfig, TrainerConfig
from dstune.config.validate import find_problems
from dstune.core.errors import UserError
from dstune.data.collate import collate
from dstune.data.formats import recognise
from dstune.data.prepared import Split
from dstune.data.rows import RowError, normalise
from dstune.data.sampler import MicroBatch
from dstune.launch import first_rows
from dstune.models.heads.language import decoder_inputs_from_labels
from dstune.samples import convert
from dstune.samples.debian import DebianPackage
from dstune.show.facts import repetitions
from dstune.tasks.classification.config import ClassificationConfig
from dstune.tasks.seq2seq.config import Seq2SeqConfig
from dstune.tasks.seq2seq.metrics import generation_metrics
from dstune.trainer.baseline import draw
from dstune.trainer.callbacks.evaluation_cost import EvaluationCost, evaluations, fraction
from dstune.trainer.evaluate import InContext
from dstune.trainer.generation import Generated

TASK = Seq2SeqConfig(prompt="Say in Spanish: {source}", template_date="2025-03-09")
PAIR = {"source": "the sun", "target": "el sol"}


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        (PAIR, {}),
        ({"translation": {"en": "the sun", "es": "el sol"}}, {"source": "en", "target": "es"}),
        ({"en": "the sun", "es": "el sol", "id": 3}, {"source": "en", "target": "es"}),
        ({"document": "the sun", "summary": "el sol"}, {}),
    ],
)
def test_rows_have_a_source_and_a_target_under_many_names(row, mapping):
    assert recognise(row, mapping, "auto", TASK, "rows.jsonl:1") == "source_target"
    assert normalise(row, "source_target", mapping) == PAIR


def test_rows_without_are_refused_with_the_mapping_to_give():
    with pytest.raises(UserError, match=r"data.columns=\{source: en, target: es\}"):
        recognise({"translation": {"en": "a", "es": "b"}, "id": 1}, {}, "auto", TASK, "rows.jsonl:1")
    with pytest.raises(RowError, match="'target' is empty"):
        normalise({"source": "a", "target": " "}, "source_target", {})


def samples(tmp_path: Path, task: Seq2SeqConfig, *rows: dict, encoder_decoder: bool = False, **data: object) -> Split:
    tokenizer = byte_tokenizer()
    if encoder_decoder:
        mark_encoder_decoder(tokenizer)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = data_run(path, task=task, split=SplitConfig(validation=0.0), packing=False, **data)
    return prepared(config, tokenizer, tmp_path / "cache").train


def written(ids: np.ndarray) -> str:
    return byte_tokenizer().decode(ids)


def test_a_decoder_is_prompted_through_its_template_or_plainly(tmp_path):
    chat_sample = samples(tmp_path, TASK, PAIR).sample(0)
    assert written(chat_sample["input_ids"]) == (
        "<|im_start|>user\nSay in Spanish: the sun<|im_end|>\n<|im_start|>assistant\nel sol<|im_end|>\n"
    )
    plain = replace(TASK, prompt="English: {source}\nSpanish:", chat=False, separator=" ")
    split = samples(tmp_path, plain, PAIR)
    plain_sample = split.sample(0)
    assert written(plain_sample["input_ids"]) == "English: the sun\nSpanish: el sol<|im_end|>"
    for each in (chat_sample, plain_sample):
        assert written(each["labels"][each["labels"] != -100]).strip() == "el sol<|im_end|>"
    assert split.source_and_target(0) == PAIR and "source" not in plain_sample
    assert split.weights[0] == (plain_sample["labels"] != -100).sum()


def test_control_tokens_in_a_row_are_text(tmp_path):
    row = {"source": "a <|im_end|> b", "target": "c <|im_end|> d"}
    end = byte_tokenizer().eos_token_id
    for encoder_decoder in (False, True):
        sample = samples(tmp_path, TASK, row, encoder_decoder=encoder_decoder).sample(0)
        ids = np.concatenate([sample["input_ids"], sample.get("target_ids", [])]).astype(int)
        assert (ids == end).sum() == (1 if encoder_decoder else 2)
        assert written(ids).count("<|im_end|>") == (3 if encoder_decoder else 4)


def test_a_long_source_is_shortened_and_the_target_stays_whole(tmp_path):
    row = {"source": "word " * 100, "target": "the short target"}
    split = samples(tmp_path, TASK, row, max_length=64)
    sample = split.sample(0)
    text = written(sample["input_ids"])
    assert 56 < len(sample["input_ids"]) <= 64
    assert "word word" in text and text.endswith("<|im_start|>assistant\nthe short target<|im_end|>\n")
    assert split.source_and_target(0)["source"] == row["source"]
    cut = samples(tmp_path, replace(TASK, max_target_length=4), row, max_length=64).sample(0)
    assert (cut["labels"] != -100).sum() == 4 and cut["labels"][-1] != byte_tokenizer().eos_token_id


def test_an_encoder_reads_the_prompt_and_the_decoder_writes_the_target(tmp_path):
    rows = [PAIR, {"source": "word " * 100, "target": "a much longer target than the first one"}]
    split = samples(tmp_path, replace(TASK, max_target_length=8), *rows, encoder_decoder=True, max_length=32)
    first, second = split.sample(0), split.sample(1)
    assert written(first["input_ids"]) == "Say in Spanish: the sun"
    assert written(first["target_ids"]) == "el sol<|im_end|>"
    assert (len(second["input_ids"]), len(second["target_ids"])) == (32, 8)
    assert split.weights.tolist() == [len(first["target_ids"]), 8]
    assert split.lengths.tolist() == [len(first["input_ids"]) + len(first["target_ids"]), 40]
    micro_batch = MicroBatch(0, ((0,), (1,)))
    batch = collate(split, micro_batch, pad_token_id=0, packing=False)
    assert batch["input_ids"].shape == (2, 32) and batch["labels"].shape == (2, 8)
    assert (batch["labels"] != -100).sum(dim=1).tolist() == split.weights.tolist()
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(first["input_ids"]), 32]
    filler = collate(split, replace(micro_batch, filler=True), pad_token_id=0, packing=False)
    assert (filler["labels"] == -100).all()


def test_the_decoder_reads_what_the_models_own_forward_would_give_it():
    """M2M100 (NLLB) has no method for it, and its forward uses a function of its module."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8}
    sizes |= {"decoder_ffn_dim": 8, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0}
    model = M2M100ForConditionalGeneration(M2M100Config(**sizes)).eval()
    labels = torch.tensor([[7, 9, 2], [8, 2, -100]])
    source = torch.randint(3, 40, (2, 5))
    decoder_input_ids = decoder_inputs_from_labels(model)(labels=labels)
    assert decoder_input_ids.tolist() == [[2, 7, 9], [2, 8, 2]]
    expected = model(input_ids=source, labels=labels).logits
    assert torch.equal(model(input_ids=source, decoder_input_ids=decoder_input_ids).logits, expected)


def test_repeated_targets_of_different_sources_are_reported(tmp_path):
    rows = [{"source": source, "target": "x y"} for source in ("a", "b")]
    split = samples(tmp_path, TASK, *rows, {"source": "c", "target": "z"}, encoder_decoder=True)
    whole, targets = repetitions(split, byte_tokenizer(), with_answers=True)
    assert whole == [] and [(one.count, one.text) for one in targets] == [(2, "x y")]


def test_samples_in_context_have_targets_of_their_own_only(tmp_path):
    split = samples(tmp_path, TASK, PAIR)
    alone = split.sample(0)
    parts = (split.name, split.table, split.lengths, split.weights, None)
    first, behind = (InContext(*parts, context=(7, 8), prefix=prefix).sample(0) for prefix in ((), (1,)))
    assert first["input_ids"].tolist() == [7, 8, *alone["input_ids"]]
    assert first["labels"].tolist() == [-100, -100, *alone["labels"]]
    assert alone["input_ids"][0] == 1 and behind["input_ids"].tolist() == [7, 8, *alone["input_ids"][1:]]
    assert len(behind["labels"]) == len(behind["input_ids"])


def test_metrics_of_equal_texts_are_perfect_and_of_others_not():
    same = [Generated("", text, text) for text in ("the cat sat on the mat", "one two three four five")]
    found = generation_metrics(same)
    assert found == pytest.approx(
        {"bleu": 100, "chrf": 100, "ter": 0, "rouge1": 1, "rouge2": 1, "rougeL": 1, "generated": 2}
    )
    # One of five words replaced: one edit of eleven words, ROUGE-1 of 4/5 for the second row.
    changed = generation_metrics([same[0], Generated("", same[1].target, "one two three four six")])
    assert changed["ter"] == pytest.approx(100 / 11)
    assert changed["rouge1"] == pytest.approx((1 + 0.8) / 2)


def test_the_share_of_evaluation_is_reported_once_with_a_warning_where_it_is_much():
    often = run_config(evaluate=EvaluateConfig(every=50))
    assert fraction(evaluations(often, 100, 1.0), 100, 5.0, 1.0) == pytest.approx(15 / 115)
    cost = EvaluationCost(often, 100, 1.0)
    assert cost.evaluated(5.0) is None
    messages = [cost.stepped(1.0) for _ in range(4)]
    assert messages[:2] == [None, None] and messages[3] is None
    assert messages[2] is not None and messages[2].startswith("warning: 3 evaluations of 5.0 s: about 13%")
    once = EvaluationCost(run_config(evaluate=EvaluateConfig(every=0, at_start=False)), 100, 1.0)
    assert [once.stepped(1.0) for _ in range(5)] == [None] * 5
    line = once.evaluated(5.0)
    assert line is not None and line.startswith("the evaluation of 5.0 s: about 5%")


def test_examples_are_the_same_every_time_and_of_all_classes():
    lengths = np.array([9, 3, 4, 5, 6, 30, 40, 50], dtype=np.int32)
    split = Split("train", None, lengths, np.ones(8))  # type: ignore[arg-type]
    chosen = draw(split, 3, seed=1)
    assert chosen == draw(split, 3, seed=1) and len(set(chosen)) == 3
    assert all(lengths[index] <= np.median(lengths) for index in chosen)
    assert draw(split, 0, seed=1) == []
    classes = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    for seed in range(5):
        assert sorted(classes[draw(split, 2, seed, classes)]) == [0, 1]


def test_impossible_settings_are_refused():
    def problems_of(**sections) -> str:
        return " ".join(str(problem) for problem in find_problems(run_config(**sections)))

    data = DataConfig(train="x", packing=False)
    assert "must contain {source} exactly once" in problems_of(task=Seq2SeqConfig(prompt="Translate"), data=data)
    config = EvaluateConfig(baseline_shots=[0, 4])
    assert "--prompted MODEL" in problems_of(task=ClassificationConfig(), data=data, evaluate=config)
    assert "baseline_shots" not in problems_of(task=TASK, data=data, evaluate=config)


# -- verses from packages of Debian's ---------------------------------------------------------------------------------


def module(folder: str, chapters: dict[str, list[str]]) -> dict[str, bytes]:
    """A SWORD module of one block a testament; the New Testament is empty."""
    entries = ["", "<milestone/>", '<div osisID="Gen" type="book"/> <title>Genesis</title>']
    for name, texts in chapters.items():
        entries += [f'<chapter osisID="{name}" sID="{name}"/> <title>heading</title>', *texts]
    packed = "".join(entries).encode()
    block = zlib.compress(packed)
    index, place = b"", 0
    for entry in entries:
        index += struct.pack("<IIH", 0, place, len(entry.encode()))
        place += len(entry.encode())
    files = {"ot.bzz": block, "ot.bzs": struct.pack("<III", 0, len(block), len(packed)), "ot.bzv": index}
    files |= {"nt.bzz": b"", "nt.bzs": b"", "nt.bzv": b""}
    return {f"{folder}/{name}": content for name, content in files.items()}


def deb(path: Path, files: dict[str, bytes]) -> Path:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": packed.getvalue()}
    content = b"!<arch>\n"
    for name, body in members.items():
        content += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode() + body + b"\n" * (len(body) % 2)
        )
    path.write_bytes(content)
    return path


def test_verses_are_paired_by_name_without_notes_and_headings(tmp_path):
    english = module("usr/x", {"Gen.1": ["In the <note>b</note>beginning.", "", "Third."], "Gen.2": ["Thus it was."]})
    english["usr/share/doc/e/copyright"] = b"public domain"
    words = '<w lemma="a">En el</w><w lemma="b">principio</w>.'
    spanish = module("usr/y", {"Gen.1": [words, "Segundo.", "Tercero."], "Gen.2": ["Fue", "Otro."]})
    wheels = [deb(tmp_path / "e.deb", english), deb(tmp_path / "s.deb", spanish)]
    convert.convert("dstune.samples.convert:verses", tmp_path, *wheels)
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert rows == [  # Gen.1.2 has no English, and Gen.2.1 is four times as long there
        {"en": "In the beginning.", "es": "En el principio.", "verse": "Gen.1.1"},
        {"en": "Third.", "es": "Tercero.", "verse": "Gen.1.3"},
    ]
    assert (tmp_path / "LICENSE.package").read_bytes() == b"public domain"


def test_a_package_that_cannot_be_had_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    package = DebianPackage("thing", "1-1", "thing_1-1_all.deb", "0" * 64, 10)
    with pytest.raises(
        UserError, match=r"(?s)no apt-get on this machine.*apt-get download thing=1-1.*thing_1-1_all.deb"
    ):
        package.fetch(tmp_path, "sample://thing")
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\n: > thing_1-1_all.deb\n")
    apt.chmod(0o755)
    with pytest.raises(UserError, match=r"another thing_1-1_all\.deb than the pinned one"):
        package.fetch(tmp_path, "sample://thing")


def test_scores_that_decide_need_an_extra(monkeypatch):
    """Where its package is missing, a score is left out; one by which the run decides is refused first."""
    monkeypatch.setattr("dstune.tasks.seq2seq.find_spec", lambda name: None)
    assert not list(first_rows.task_problems(run_config(task=TASK)))
    stopping = EarlyStoppingConfig(metric="bleu")
    (bleu,) = first_rows.task_problems(run_config(task=TASK, trainer=TrainerConfig(early_stopping=stopping)))
    assert bleu.where == "trainer.early_stopping.metric" and bleu.value == "bleu"
    assert "[generation]" in bleu.fix and "sacrebleu" in bleu.reason
