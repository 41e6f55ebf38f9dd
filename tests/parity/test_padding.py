"""A model that reads padding: refused before its first step, and exact where rows of one length share a micro-batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional
from parity.reference import train_plainly
from support.ranks import run_ranks
from support.tiny import WORDS, save_tokenizer, write_labelled
from support.workshop import PLAIN, Workshop
from transformers import ConvBertConfig, ConvBertForSequenceClassification

from dstune.testing.tiny import SPECIAL

PROGRAM = Path(__file__).with_name("train_cases.py")


class Plain:
    """As the reference loads models, for an architecture that has one kind of attention."""

    @staticmethod
    def from_pretrained(path: str, *, dtype: torch.dtype, attn_implementation: str) -> torch.nn.Module:
        return ConvBertForSequenceClassification.from_pretrained(path, dtype=dtype)


def label_loss(model, batch):
    """Of rows without padding: nothing but their tokens is read."""
    assert batch["attention_mask"].all()
    logits = model(input_ids=batch["input_ids"]).logits
    return functional.cross_entropy(logits, batch["labels"], reduction="sum"), len(logits)


def save_reader_of_padding(folder: Path) -> Path:
    sizes = {"hidden_size": 32, "embedding_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = ConvBertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=2,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label={0: "left", 1: "right"},
        label2id={"left": 0, "right": 1},
        **sizes,
    )
    torch.manual_seed(0)
    ConvBertForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("padding")
    base = [
        *PLAIN,
        "task=classification",
        f"model.path={save_reader_of_padding(folder / 'model')}",
        f"data.train={write_labelled(folder / 'rows.jsonl', 24)}",
        "optimizer.lr=0.1",
        "trainer.global_batch_size=12",
        "trainer.max_steps=2",
        "data.packing=false",
        "trainer.length_grouping=false",  # with it the size of a micro-batch decides which rows a step has
        "run.export=none",
    ]
    workshop = Workshop(folder, base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSTUNE_CACHE", str(folder / "cache"))
        fours = ["trainer.micro_batch_size=4"]
        cases = [
            workshop.case("checked", *fours) | {"refused": True},
            workshop.case("never", *fours, "data.padding=never"),
            workshop.case("tolerated", *fours, "data.padding=tolerated"),
        ]
        (output,) = run_ranks(PROGRAM, 1, cases)
        single = workshop.config("data.padding=never", "trainer.micro_batch_size=1").config
        workshop.output, workshop.expected = output, train_plainly(single, folder / "cache", Plain, label_loss)
        yield workshop


def losses(trained, name):
    return [row["loss"] for row in trained.rows(name) if "loss" in row]


def test_it_is_refused_before_the_first_step(trained):
    refusal = (trained.folder / "checked" / "refused.txt").read_text()
    assert "data.padding=checked: ConvBertForSequenceClassification reads padding" in refusal
    assert "data.padding=never" in refusal
    assert not (trained.folder / "checked" / "metrics.jsonl").exists()


def test_rows_of_one_length_are_trained_as_each_alone(trained):
    assert losses(trained, "never") == pytest.approx(trained.expected.losses, rel=1e-6)
    norms = [row["grad_norm"] for row in trained.rows("never") if "grad_norm" in row]
    assert norms == pytest.approx(trained.expected.grad_norms, rel=1e-5)


def test_padded_rows_are_not_and_the_run_says_so(trained):
    """The fault that is refused: without it `checked` would refuse nothing."""
    apart = [
        abs(loss / true - 1) for loss, true in zip(losses(trained, "tolerated"), trained.expected.losses, strict=True)
    ]
    assert max(apart) > 1e-3
    assert "warning: ConvBertForSequenceClassification reads padding" in trained.output
