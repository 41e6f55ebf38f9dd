"""Rows beside padding: the proof that a model computes them as alone, and micro-batches without padding."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.configs import run_config
from support.tiny import save_encoder
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    FNetConfig,
    FNetForSequenceClassification,
    FunnelConfig,
    FunnelForSequenceClassification,
)

from dstune.config.compose import compose
from dstune.config.data_schema import DataConfig, Padding
from dstune.config.validate import find_problems
from dstune.core.errors import UserError
from dstune.data.sampler import evaluation_batches, padded_batches
from dstune.inference.rows import Query
from dstune.models.padding import CONTENT_TOLERANCE, LENGTHS, TOLERANCE, measure_padding, rows_of_proof
from dstune.tasks.classification.config import ClassificationConfig
from dstune.tasks.classification.head import classification_head
from dstune.tasks.classification.predict import ClassificationPredictor
from dstune.trainer.data_loader import order_of
from dstune.trainer.sanity_checks import check_padding

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 128}


def reader_of_padding() -> FNetForSequenceClassification:
    torch.manual_seed(0)
    return FNetForSequenceClassification(FNetConfig(**SIZES, max_position_embeddings=64, pad_token_id=2)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def checked(model, tokenizer, padding: Padding, shortest: int = 5) -> list[str]:
    """What is told of the proof before a run."""
    data = SimpleNamespace(
        splits=[SimpleNamespace(lengths=np.array([9, shortest])), SimpleNamespace(lengths=np.array([]))]
    )
    engine = SimpleNamespace(device=torch.device("cpu"), train=model.train, forward=model)
    world = SimpleNamespace(any=bool)
    config = run_config(
        task=ClassificationConfig(), data=DataConfig(train="rows.jsonl", packing=False, padding=padding)
    )
    report: list[str] = []
    check_padding(config, engine, model, tokenizer, data, world, report.append)
    return report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_hides_padding_passes(folder: Path, dtype: torch.dtype) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
    rows = rows_of_proof(tokenizer, model)
    measured = measure_padding(model.eval(), model, rows, 2, torch.device("cpu"))
    assert measured.dtype is dtype and not measured.reads_padding
    assert measured.from_alone < TOLERANCE[dtype] / 4 and measured.from_content < CONTENT_TOLERANCE[dtype] / 4
    assert checked(model, tokenizer, Padding.checked) == []


def test_one_that_reads_it_is_refused_or_warned_of(folder: Path) -> None:
    model, tokenizer = reader_of_padding(), AutoTokenizer.from_pretrained(folder)
    with pytest.raises(UserError) as refused:
        checked(model, tokenizer, Padding.checked)
    (problem,) = refused.value.problems
    assert (problem.where, problem.value) == ("data.padding", "checked") and "data.padding=never" in problem.fix
    (warning,) = checked(model, tokenizer, Padding.tolerated)
    assert "reads padding" in warning
    assert checked(model, tokenizer, Padding.never) == []


def test_what_fails_in_the_model_is_refused(folder: Path) -> None:
    model = reader_of_padding().to(torch.bfloat16)  # the Fourier transform has no bf16 on a CPU
    with pytest.raises(UserError, match="fails in its first forward pass"):
        checked(model, AutoTokenizer.from_pretrained(folder), Padding.never)


def test_rows_that_are_too_short_alone_are_refused(folder: Path) -> None:
    """Funnel pools its positions twice: rows of up to four tokens need padding."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1, 1]}
    model = FunnelForSequenceClassification(FunnelConfig(**sizes, vocab_size=128))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert checked(model, tokenizer, Padding.never) == []
    with pytest.raises(UserError, match="fails in its first forward pass"):
        checked(model, tokenizer, Padding.never, shortest=4)


def test_rows_of_the_proof_stay_within_the_positions(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    short = BertModel(BertConfig(**SIZES, num_attention_heads=4, max_position_embeddings=24, pad_token_id=2))
    assert max(map(len, rows_of_proof(tokenizer, short))) <= 21
    long = AutoModelForSequenceClassification.from_pretrained(folder)
    rows = rows_of_proof(tokenizer, long)
    assert [len(row) - len(rows[0]) for row in rows] == [length - LENGTHS[0] for length in LENGTHS]
    measure_padding(short.eval(), short, rows_of_proof(tokenizer, short), 2, torch.device("cpu"))


def test_micro_batches_without_padding_have_one_length_and_the_steps_their_rows() -> None:
    lengths = np.random.default_rng(0).integers(3, 9, 50)
    split = SimpleNamespace(lengths=lengths, weights=np.ones(50, dtype=np.int64), sources=None)
    base = ["task=classification", "data=files", "data.train=rows.jsonl", "trainer.micro_batch_size=4"]
    base += ["trainer.global_batch_size=12", "data.packing=false"]
    padded, never = (order_of(compose([*base, f"data.padding={way}"]).config, split) for way in ("checked", "never"))
    assert never.steps_in(0) == padded.steps_in(0) == 5 and never.efficiency() == 1.0 > padded.efficiency()
    for step in range(5):
        batch, same = never.global_batch(0, step), padded.global_batch(0, step)
        samples = [sample for micro_batch in batch.micro_batches for sample in micro_batch.samples]
        assert sorted(samples) == sorted(s for micro_batch in same.micro_batches for s in micro_batch.samples)
        assert (batch.weight, batch.tokens) == (same.weight, same.tokens)
        assert [micro_batch.index for micro_batch in batch.micro_batches] == list(range(len(batch.micro_batches)))
        for micro_batch in batch.micro_batches:
            assert not micro_batch.padded and len(micro_batch.rows) <= 4
            assert len({lengths[sample] for sample in micro_batch.samples}) == 1
    config = run_config(data=DataConfig(train="rows.jsonl", padding=Padding.never, packing=False))
    batches = padded_batches(lengths, config)
    assert sorted(sample for micro_batch in batches for sample in micro_batch.samples) == list(range(50))
    assert all(len({lengths[sample] for sample in micro_batch.samples}) == 1 for micro_batch in batches)
    packed = evaluation_batches(lengths, micro_batch_size=4, max_length=16, packing=True, padded=False)
    assert all(micro_batch.padded for micro_batch in packed)


def test_answers_do_not_depend_on_the_rows_beside_them(folder: Path) -> None:
    """Of a model that reads padding; with `tolerated` they do, as in training."""
    queries = [
        Query("", {}, {"text": " ".join(f"w{number + word}" for word in range(length)), "label": "left"})
        for number, length in enumerate((3, 9, 3, 5, 14, 9))
    ]
    probabilities = {}
    for padding in (Padding.checked, Padding.tolerated):
        data = DataConfig(train="rows.jsonl", packing=False, padding=padding, max_length=32)
        task = ClassificationConfig()
        predictor = ClassificationPredictor(
            run_config(task=task, data=data),
            reader_of_padding(),
            classification_head(task),
            AutoTokenizer.from_pretrained(folder),
            ("left", "right"),
        )
        for size in (1, 6):
            answers = predictor.answers(queries, size, all_labels=True)
            probabilities[padding, size] = [answer["probabilities"]["left"] for answer in answers]
    assert probabilities[Padding.checked, 6] == pytest.approx(probabilities[Padding.checked, 1], rel=1e-5)
    assert probabilities[Padding.tolerated, 6] != pytest.approx(probabilities[Padding.tolerated, 1], rel=1e-3)


def test_batches_of_several_texts_a_row_cannot_be_without_padding() -> None:
    base = ["data=files", "data.train=rows.jsonl", "data.padding=never", "data.packing=false"]
    assert [problem.where for problem in find_problems(compose([*base, "task=reward"]).config)] == ["data.padding"]
    assert find_problems(compose([*base, "task=token_classification"]).config) == []
