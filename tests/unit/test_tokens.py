"""task=token_classification: reading, checking and cutting tagged sentences, and metrics against seqeval."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from seqeval.metrics import classification_report, f1_score, precision_score, recall_score
from support.configs import run_config
from unit.data_helpers import byte_tokenizer, data_run, prepared, refusal_of, wordpiece, write_jsonl

from dstune.config.data_schema import DataConfig, OnBadRow, SplitConfig, TextRows
from dstune.config.schema import EarlyStoppingConfig, TrainerConfig
from dstune.config.validate import find_problems
from dstune.data.collate import NO_TARGET, collate
from dstune.data.files import DataFile
from dstune.data.frame import chunks
from dstune.data.problems import RowError
from dstune.data.read_tagged import read_tagged
from dstune.data.sampler import MicroBatch
from dstune.data.tags import TagScheme, checked, completed
from dstune.show.segments import segments
from dstune.tasks.token_classification.config import TokenClassificationConfig, TrainedSubwords
from dstune.tasks.token_classification.encode import TokenEncoder
from dstune.tasks.token_classification.head import token_classification_head
from dstune.tasks.token_classification.metrics import token_metrics

LABELS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
SENTENCE = {"tokens": ["Ada", "saw", "New", "York"], "tags": ["B-PER", "O", "B-LOC", "I-LOC"]}


# ---- tags ----


def test_marks_of_entities_are_checked():
    words = ["a", "b", "c", "d"]
    bio = ["B-X", "I-X", "O", "B-Y"]
    assert checked(bio, words, TagScheme.auto, repair=False) == bio
    # BIOES and BILOU say the same of whole entities.
    assert checked(["B-X", "E-X", "O", "S-Y"], words, TagScheme.auto, repair=False) == bio
    assert checked(["B-X", "L-X", "O", "U-Y"], words, TagScheme.bio, repair=False) == bio
    # IOB1: B- only where an entity follows another one of its type.
    assert checked(["I-X", "I-X", "B-X", "I-Y"], words, TagScheme.bio, repair=True) == ["B-X", "I-X", "B-X", "B-Y"]
    for tags, number in ((["I-X", "O", "O", "O"], 1), (["B-X", "O", "I-X", "O"], 3), (["B-X", "I-Y", "O", "O"], 2)):
        with pytest.raises(RowError, match=rf"of word {number} \('{words[number - 1]}'\) continues no entity"):
            checked(tags, words, TagScheme.auto, repair=False)
    pos = ["DET", "NOUN", "I-X", "O"]
    assert checked(pos, words, TagScheme.auto, repair=False) == pos
    with pytest.raises(RowError, match="'DET' of word 1"):
        checked(pos, words, TagScheme.bio, repair=False)
    assert completed(["I-LOC", "B-PER"]) == LABELS
    assert completed(["DET", "NOUN"]) == ("DET", "NOUN")


def test_bad_rows_are_named_by_file_and_line(tmp_path):
    rows = [
        SENTENCE,
        {"tokens": ["a", "b"], "tags": ["O"]},
        {"tokens": ["a", ""], "tags": ["O", "O"]},
        {"tokens": ["a"], "tags": ["I-LOC"]},
        {"tokens": ["a"], "tags": [7]},
        {"tokens": [], "tags": []},
    ]
    task = TokenClassificationConfig(stride=2)
    config = data_run(write_jsonl(tmp_path / "bad.jsonl", rows), task=task, packing=False)
    problems = refusal_of(config, wordpiece(), tmp_path)
    assert [problem.where for problem in problems] == [f"{tmp_path}/bad.jsonl:{line}" for line in range(2, 7)]
    reasons = ["2 tokens have 1 tags", "word 2", "continues no entity", "task.labels", "is empty"]
    assert all(reason in problem.reason for reason, problem in zip(reasons, problems, strict=True)), problems
    held = data_run(
        tmp_path / "bad.jsonl",
        task=TokenClassificationConfig(stride=2, repair=True, labels=list(LABELS)),
        packing=False,
        on_bad_row=OnBadRow.skip,
        split=SplitConfig(validation=0.0),
    )
    data = prepared(held, wordpiece(), tmp_path / "cache")
    assert data.labels == LABELS
    assert data.report["train"]["bad_rows"] == 4 and len(data.train.lengths) == 2  # the I-LOC was mended


def test_numbers_get_their_names(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"tokens": ["a", "b"], "ner_tags": [1, 0]}])
    task = TokenClassificationConfig(labels=["O", "B-X"], stride=2)
    data = prepared(data_run(path, task=task, packing=False), wordpiece(), tmp_path / "cache")
    assert data.train.sample(0)["labels"].tolist() == [NO_TARGET, 1, 0, NO_TARGET]


# ---- files ----


def test_files_of_tagged_words(tmp_path):
    conll = tmp_path / "train.conll"
    conll.write_text("-DOCSTART- -X- O\n\nAda NNP B-PER\nsaw VBD O\n\n\nbroken\n\nNew NNP B-LOC\nYork NNP I-LOC")
    first, broken, last = read_tagged(DataFile(conll))
    assert (first.line, first.fields["tokens"], first.fields["tags"]) == (3, ["Ada", "saw"], ["B-PER", "O"])
    assert first.fields["column_2"] == ["NNP", "VBD"]
    assert (broken.line, broken.fields, broken.error) == (7, None, "1 column, a word and its tag are needed")
    assert (last.line, last.fields["tags"]) == (9, ["B-LOC", "I-LOC"])
    conllu = tmp_path / "train.conllu"
    word = "{}\t{}\t_\t{}\tx\t_\t0\troot\t_\t_\n"
    conllu.write_text(
        "# text = im Haus\n1-2\tim" + "\t_" * 8 + "\n" + word.format(1, "in", "ADP") + word.format(2, "dem", "DET")
    )
    (row,) = read_tagged(DataFile(conllu))
    assert (row.line, row.fields["tokens"], row.fields["tags"], row.fields["xpos"]) == (
        3,
        ["in", "dem"],
        ["ADP", "DET"],
        ["x", "x"],
    )
    # A .txt file is read so where data.text_rows says it; another column may hold the tags.
    text = tmp_path / "train.txt"
    text.write_text("Ada\tNNP\tB-PER\nsaw\tVBD\tO\n")
    task = TokenClassificationConfig(stride=2)
    config = data_run(text, task=task, packing=False, text_rows=TextRows.tagged, columns={"tags": "column_2"})
    assert prepared(config, wordpiece(), tmp_path / "cache").labels == ("NNP", "VBD")


# ---- sub-words ----


def encoded(row: dict, max_length: int = 64, **settings) -> list:
    task = TokenClassificationConfig(**({"stride": 2} | settings))
    return TokenEncoder(wordpiece(), task, max_length, LABELS)([row], [0])


def test_the_first_subword_has_the_tag():
    (sample,) = encoded(SENTENCE)
    labels = sample.labels.tolist()
    #          [CLS] a d a   s a w   n e w   y o r k  [SEP]
    assert labels == [-100, 3, -100, -100, 0, -100, -100, 1, -100, -100, 2, -100, -100, -100, -100]
    assert sample.weight == 4 and not sample.problem
    (sample,) = encoded(SENTENCE, subwords=TrainedSubwords.all)
    assert sample.labels.tolist() == [-100, 3, 4, 4, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2, -100]
    assert np.flatnonzero(sample.columns["word_start"]).tolist() == [1, 4, 7, 10]


def test_every_word_is_measured_whatever_the_tokenizer_does():
    """A word that it drops, one that it splits at punctuation, and one that reads like a control token."""
    row = {"tokens": ["\u200b\x07", "a!a", "[SEP]", "b"], "tags": ["B-PER", "I-PER", "O", "B-LOC"]}
    (sample,) = encoded(row)
    assert [label for label in sample.labels if label != NO_TARGET] == [3, 4, 0, 1]
    tokens = wordpiece().convert_ids_to_tokens(sample.input_ids)
    assert tokens[:3] == ["[CLS]", "[UNK]", "a"] and tokens.count("[SEP]") == 1
    # A byte-level tokenizer has the space in front of a word in the word's token.
    words = {"tokens": ["two", "and", "two"], "tags": ["O", "B-LOC", "I-LOC"]}
    (sample,) = TokenEncoder(byte_tokenizer(), TokenClassificationConfig(stride=2), 64, LABELS)([words], [0])
    assert [label for label in sample.labels if label != NO_TARGET] == [0, 1, 2]


@pytest.mark.parametrize("subwords", TrainedSubwords)
@pytest.mark.parametrize("stride", [0, 3, 64])
def test_windows_count_every_word_once(stride, subwords):
    choose = np.random.RandomState(0)
    words = ["".join(choose.choice(list("abc"), choose.randint(1, 6))) for _ in range(60)] + ["a" * 30, "b"]
    tags = [str(choose.choice(["O", "B-PER", "B-LOC"])) for _ in words]
    row = {"tokens": words, "tags": tags}
    samples = encoded(row, max_length=12, stride=stride, subwords=subwords)
    assert len(samples) > 10 and max(len(sample.input_ids) for sample in samples) <= 12
    found = []
    for sample in samples:
        starts = sample.columns.get("word_start", sample.labels != NO_TARGET) != 0
        found += sample.labels[starts].tolist()
    assert found == [LABELS.index(tag) for tag in tags]
    assert all(sample.truncated and sample.length == samples[0].length for sample in samples)
    if subwords is TrainedSubwords.all:
        assert sum(sample.weight for sample in samples) == sum(map(len, words))


def test_windows_of_a_sentence():
    assert chunks(10, 10, 3) == [(0, 10)]
    assert chunks(11, 6, 2) == [(0, 6), (4, 10), (8, 11)]
    assert chunks(11, 6, 2, starts=[0, 5, 9]) == [(0, 6), (5, 11)]


def test_a_batch_and_its_loss(tmp_path):
    rows = [SENTENCE, {"tokens": ["b"], "tags": ["O"]}]
    task = TokenClassificationConfig(stride=2, subwords=TrainedSubwords.all)
    config = data_run(
        write_jsonl(tmp_path / "rows.jsonl", rows), task=task, packing=False, split=SplitConfig(validation=0.0)
    )
    data = prepared(config, wordpiece(), tmp_path / "cache")
    batch = collate(data.train, MicroBatch(0, ((0,), (1,))), pad_token_id=0, packing=False)
    assert batch["labels"].shape == batch["word_start"].shape == (2, 16)
    logits = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def forward(**inputs):
        assert set(inputs) == {"input_ids", "attention_mask"}
        return type("Output", (), {"logits": logits})

    output = token_classification_head(forward, batch)
    counted = batch["labels"] != NO_TARGET
    assert output.weight == counted.sum() == sum(data.train.weights) == 14
    expected = functional.cross_entropy(logits[counted], batch["labels"][counted], reduction="sum")
    assert float(output.loss_sum.detach()) == pytest.approx(float(expected.detach()))
    assert not output.rows  # nothing is brought to the CPU while training
    with torch.no_grad():
        kept = token_classification_head(forward, batch).rows
    assert [len(part) for part in kept["label"]] == [4, 1]
    first = batch["word_start"][0] > 0
    assert kept["prediction"][0].tolist() == logits[0].argmax(-1)[first].tolist()
    filler = collate(data.train, MicroBatch(0, ((0,),), filler=True), pad_token_id=0, packing=False)
    assert token_classification_head(forward, {**filler, "labels": filler["labels"].expand(2, -1)}).loss_sum == 0


# ---- metrics ----


def test_entity_metrics_are_those_of_seqeval():
    choose = np.random.RandomState(1)
    true, predicted = (
        [[str(tag) for tag in choose.choice(LABELS, choose.randint(1, 9))] for _ in range(40)] for _ in range(2)
    )
    predicted = [(tags * 9)[: len(of)] for tags, of in zip(predicted, true, strict=True)]
    metrics, by_type = token_metrics(predicted, true, LABELS)
    assert metrics["entity_f1"] == pytest.approx(f1_score(true, predicted))
    assert metrics["entity_precision"] == pytest.approx(precision_score(true, predicted))
    assert metrics["entity_recall"] == pytest.approx(recall_score(true, predicted))
    right = [a == b for tags, of in zip(predicted, true, strict=True) for a, b in zip(tags, of, strict=True)]
    assert metrics["token_accuracy"] == pytest.approx(np.mean(right))
    report = classification_report(true, predicted, output_dict=True)
    assert by_type["PER"]["f1"] == pytest.approx(report["PER"]["f1-score"]) and set(by_type) == {"LOC", "PER"}
    # Nothing is an entity and nothing was found: seqeval raises.
    assert token_metrics([["O"]], [["O"]], LABELS)[0]["entity_f1"] == 0.0
    plain, by_tag = token_metrics([["DET", "X"]], [["DET", "NOUN"]], ("DET", "NOUN", "X"))
    assert plain == {"token_accuracy": 0.5, "f1_macro": pytest.approx(1 / 3)}
    assert by_tag["DET"]["f1"] == 1.0


def test_plain_tags_are_single_words_even_where_they_look_like_marks_of_entities(tmp_path):
    found, by_tag = token_metrics([["B-LOC", "O"]], [["B-LOC", "I-LOC"]], LABELS, TagScheme.plain)
    assert found == {"token_accuracy": 0.5, "f1_macro": pytest.approx(1 / 3)}
    assert by_tag.keys() == {"B-LOC", "I-LOC", "O"}
    stopping = TrainerConfig(early_stopping=EarlyStoppingConfig(metric="f1_macro"))
    rows = write_jsonl(tmp_path / "rows.jsonl", [SENTENCE] * 3)
    for task, refused in (
        (TokenClassificationConfig(), True),
        (TokenClassificationConfig(scheme=TagScheme.plain), False),
    ):
        config = replace(data_run(rows, task=task, packing=False, split=SplitConfig(validation=0.0)), trainer=stopping)
        if refused:
            (problem,) = refusal_of(config, wordpiece(), tmp_path)
            assert "measured as a whole" in problem.reason
        else:
            assert prepared(config, wordpiece(), tmp_path / "cache").labels == ("B-LOC", "B-PER", "I-LOC", "O")


def test_a_mistyped_mark_does_not_turn_entities_into_tags_of_words(tmp_path):
    odd = {"tokens": ["bo", "saw", "it"], "tags": ["PER", "O", "O"]}
    rows = write_jsonl(tmp_path / "rows.jsonl", [*[SENTENCE] * 3, odd])

    def run(scheme: TagScheme):
        task = TokenClassificationConfig(scheme=scheme)
        return data_run(rows, task=task, packing=False, split=SplitConfig(validation=0.0))

    (problem,) = refusal_of(run(TagScheme.auto), wordpiece(), tmp_path)
    assert problem.where == "task.scheme"
    assert "mark entities (B-LOC, B-PER, I-LOC), except PER" in problem.reason
    assert "PER" in prepared(run(TagScheme.plain), wordpiece(), tmp_path / "cache").labels


# ---- what is shown, what is refused ----


def test_show_marks_entities():
    (sample,) = encoded(SENTENCE)
    pieces = segments(wordpiece(), sample.input_ids, sample.labels, LABELS)
    assert [(piece.text.strip(), piece.tag) for piece in pieces] == [
        ("[CLS]", ""),
        ("ada", "PER"),
        ("saw", ""),
        ("new york", "LOC"),
        ("[SEP]", ""),
    ]


def test_what_is_refused():
    def keys(task: TokenClassificationConfig, **data) -> set[str]:
        config = run_config(task=task, data=DataConfig(train="x.jsonl", **({"packing": False} | data)))
        return {problem.where for problem in find_problems(config)}

    assert not keys(TokenClassificationConfig())
    assert keys(TokenClassificationConfig(), packing=True) == {"data.packing"}
    assert keys(TokenClassificationConfig(scheme=TagScheme.plain, repair=True)) == {"task.repair"}
    assert keys(TokenClassificationConfig(labels=["O", "O"])) == {"task.labels"}
