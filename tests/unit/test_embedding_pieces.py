"""The loss of contrastive pairs by hand and against sentence-transformers, retrieval metrics by hand, and their rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from unit.data_helpers import byte_tokenizer, data_run, prepared, write_jsonl

from dstune.config.data_schema import SplitConfig
from dstune.core.errors import UserError
from dstune.data.rows import RowError, normalise
from dstune.data.sampler import MicroBatch
from dstune.tasks.embedding.config import EmbeddingConfig, Pooling
from dstune.tasks.embedding.encode import ContrastiveEncoder, contrastive_batch
from dstune.tasks.embedding.head import EmbeddingHead, _rows, contrastive_losses, pooled
from dstune.tasks.embedding.metrics import embedding_metrics

X, Y, Z = np.eye(3)


def keys(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def test_loss_of_two_pairs_and_a_negative_by_hand():
    anchors, positives = torch.tensor(np.stack([X, Y])), torch.tensor(np.stack([X, (Y + Z) / math.sqrt(2)]))
    vectors = (anchors, positives, torch.tensor(Z[None]))
    losses = contrastive_losses(vectors, (keys(1, 2), keys(3, 4), keys(5)), 0.5)
    one = math.exp(2) / (math.exp(2) + 1 + 1)  # cosines 1, 0, 0
    half = math.exp(math.sqrt(2))  # cosine 1 / sqrt(2)
    assert losses.tolist() == pytest.approx([-math.log(one), -math.log(half / (1 + half + 1))])
    # As texts of the same anchor, or equal positives, the pairs are no negatives of each other.
    for anchor_keys, positive_keys in ((keys(1, 1), keys(3, 4)), (keys(1, 2), keys(3, 3))):
        losses = contrastive_losses(vectors, (anchor_keys, positive_keys, keys(5)), 0.5)
        assert losses.tolist() == pytest.approx(
            [-math.log(math.exp(2) / (math.exp(2) + 1)), -math.log(half / (half + 1))]
        )


def test_loss_is_that_of_sentence_transformers():
    """MultipleNegativesRankingLoss on the same vectors, its scale the inverse of the temperature."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses", reason="sentence-transformers")
    generator = torch.Generator().manual_seed(0)
    anchors, positives, negatives = (
        torch.nn.functional.normalize(torch.randn(6, 5, generator=generator), dim=-1) for _ in range(3)
    )
    theirs = losses.MultipleNegativesRankingLoss(model=None, scale=20.0)
    expected = theirs.compute_loss_from_embeddings([anchors, positives, negatives], labels=None)
    numbers = [keys(*range(start, start + 6)) for start in (0, 6, 12)]
    mine = contrastive_losses((anchors, positives, negatives), numbers, 0.05).mean()
    assert float(mine) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("pooling", "expected"), [(Pooling.mean, 2.0), (Pooling.cls, 1.0), (Pooling.last, 3.0)])
def test_pooling_leaves_padding_out(pooling, expected):
    hidden = torch.tensor([[[1.0, 1.0], [3.0, 1.0], [9.0, 9.0]]])
    (vector,) = pooled(hidden, torch.tensor([[1, 1, 0]]), pooling)
    assert float(vector[0] / vector[1]) == pytest.approx(expected)
    assert float(vector.norm()) == pytest.approx(1.0)


def test_the_gradient_of_the_joined_window_is_that_of_its_loss_and_fillers_get_none():
    head = EmbeddingHead(EmbeddingConfig(temperature=0.5))

    def part(number: int, negatives: int, counted: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        vectors = torch.nn.functional.normalize(torch.randn(4 + negatives, 3, generator=generator), dim=-1)
        base = 10 * number
        kinds = {"anchor_key": keys(base, base + 1), "positive_key": keys(base + 2, base + 3)}
        kinds["negative_key"] = keys(*range(base + 4, base + 4 + negatives))
        return {"vectors": vectors, "counted": torch.full((2,), counted), **kinds}

    parts = [part(1, 1, 1), part(2, 0, 1), part(1, 1, 0)]
    shares = head.join(parts)
    leaves = [one["vectors"].clone().requires_grad_() for one in parts[:2]]
    anchors, positives = (torch.cat([leaf[at : at + 2] for leaf in leaves]) for at in (0, 2))
    near = anchors @ torch.cat([positives, leaves[0][4:]]).T / 0.5
    loss = torch.nn.functional.cross_entropy(near, torch.arange(4), reduction="sum")
    loss.backward()
    for leaf, share in zip(leaves, shares, strict=False):
        assert torch.allclose(leaf.grad, share["gradient"], atol=1e-6)
    assert float(shares[0]["loss"] + shares[1]["loss"]) == pytest.approx(float(loss))
    assert float(shares[2]["loss"]) == 0.0
    assert not shares[2]["gradient"].any()


def row(anchor, positive, anchor_key, positive_key, negative=None, negative_key=None):
    none = np.empty((0, 3))
    return {
        "anchor": anchor,
        "positive": positive,
        "negative": none if negative is None else negative[None],
        "anchor_key": anchor_key,
        "positive_key": positive_key,
        "negative_key": np.array([] if negative is None else [negative_key], dtype=np.int64),
    }


def test_ranks_by_hand():
    close = (X + 0.5 * Y) / math.sqrt(1.25)
    found = embedding_metrics(
        [
            row(X, X, 1, 11),  # rank 1
            row(X, close, 1, 12),  # the other positive of the same anchor does not stand in its way: rank 1
            row(Z, Y, 3, 13, negative=Z, negative_key=21),  # the negative is nearer: 0 ties with X, close and Y itself
        ],
        temperature=1.0,
    )
    # Third row: similarities to X, close, Y, Z are 0, 0, 0, 1, and a tie counts as nearer: rank 4.
    assert found["recall_at_1"] == pytest.approx(2 / 3)
    assert found["recall_at_5"] == 1.0
    assert found["mrr"] == pytest.approx((1 + 1 + 1 / 4) / 3)


def test_vectors_that_are_all_alike_find_nothing():
    found = embedding_metrics([row(X, X, number, 100 + number) for number in range(20)], temperature=1.0)
    assert (found["recall_at_1"], found["recall_at_10"], found["mrr"]) == (0.0, 0.0, pytest.approx(1 / 20))
    assert found["loss"] == pytest.approx(math.log(20))


def test_rows_of_texts(tmp_path):
    with pytest.raises(RowError, match="positive and negative are the same"):
        normalise({"anchor": "a", "positive": "b", "negative": "b"}, "contrastive", {})
    texts = [{"anchor": "a cat", "positive": "an animal", "negative": None}, {"anchor": "x", "positive": "y" * 50}]
    config = data_run(
        write_jsonl(tmp_path / "texts.jsonl", [*texts, {"anchor": "b", "positive": "c", "negative": "d"}]),
        task=EmbeddingConfig(),
        packing=False,
        max_length=16,
        split=SplitConfig(validation=0.0),
    )
    tokenizer = byte_tokenizer()
    data = prepared(config, tokenizer, tmp_path / "cache")
    samples = [data.train.sample(number) for number in range(3)]
    assert tokenizer.decode(samples[0]["positive_input_ids"]) == "an animal"
    assert [len(sample["negative_input_ids"]) for sample in samples] == [0, 0, 1]
    assert (len(samples[1]["positive_input_ids"]), data.report["train"]["truncated"]) == (16, 1)
    assert data.train.lengths[0] == len(samples[0]["input_ids"]) + len(samples[0]["positive_input_ids"])
    bad = write_jsonl(tmp_path / "bad.jsonl", [*texts, {"anchor": "b", "positive": " "}])
    with pytest.raises(UserError) as caught:
        prepared(data_run(bad, task=EmbeddingConfig(), packing=False), tokenizer, tmp_path / "cache")
    assert (caught.value.problems[0].where, caught.value.problems[0].reason) == (
        f"{bad}:3",
        "column 'positive' is empty",
    )


def test_several_positives_and_negatives(tmp_path):
    rows = [
        {"query": "a cat", "pos": ["an animal", "a pet"], "neg": ["a car", "a bus", "a tram"]},
        {"query": "a tree", "pos": ["a plant"], "neg": []},
        {"query": "x", "pos": ["y"], "neg": ["z", "z z"]},
    ]
    file = write_jsonl(tmp_path / "texts.jsonl", rows)
    config = data_run(file, task=EmbeddingConfig(), packing=False, split=SplitConfig(validation=0.0))
    tokenizer = byte_tokenizer()
    split = prepared(config, tokenizer, tmp_path / "cache").train
    batch = contrastive_batch(split, MicroBatch(0, ((0, 1, 2, 3),)), 0)
    texts = [
        tokenizer.decode(ids[mask == 1]) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert texts[:4] == ["a cat", "a cat", "a tree", "x"]
    assert texts[4:8] == ["an animal", "a pet", "a plant", "y"]
    assert texts[8:] == ["a car", "a tram", "a bus", "z", "z z"]
    assert batch["negative_owner"].tolist() == [0, 0, 1, 3, 3]
    vectors = torch.arange(13.0)[:, None]
    found = _rows(vectors, {name: torch.from_numpy(array) for name, array in batch.items()})
    assert [of_pair.flatten().tolist() for of_pair in found["negative"]] == [[8.0, 9.0], [10.0], [], [11.0, 12.0]]
    assert [len(of_pair) for of_pair in found["negative_key"]] == [2, 1, 0, 2]


def test_a_text_to_predict_for_needs_no_positive():
    tokenizer = byte_tokenizer()
    encoder = ContrastiveEncoder(tokenizer, 4)
    short, long, empty = encoder([{"anchor": "cat"}, {"anchor": "a longer text"}, {"anchor": ""}], [0, 1, 2])
    assert tokenizer.decode(short.input_ids) == "cat"
    assert [len(short.columns[name]) for name in encoder.columns] == [0, 0, 0]
    assert (short.truncated, long.truncated, len(long.input_ids)) == (False, True, 4)
    assert empty.problem == "a text has no token"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"query": "a", "pos": []}, "there is no positive"),
        ({"query": "a", "pos": ["b", "c"], "neg": ["c"]}, "positive and negative are the same"),
        ({"query": "a", "pos": ["b", " "]}, "column 'pos' is empty"),
        ({"query": "a", "pos": ["b"], "neg": [3]}, "column 'neg' must be text, it is int"),
    ],
)
def test_texts_that_are_no_pair(row, reason):
    with pytest.raises(RowError, match=reason):
        normalise(row, "bge", {})
