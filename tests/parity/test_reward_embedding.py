"""Reward and embedding models on 1, 2 and 3 ranks at ZeRO 0 to 3 = a plain loop over the whole global batch, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from parity.reference import descend
from support.ranks import run_ranks
from support.tiny import save_decoder, save_encoder, write_contrastive, write_preferences
from support.workshop import PLAIN, Workshop

from dstune.core.rank_env import RankEnv
from dstune.data.batches import batch_of
from dstune.data.build import prepare
from dstune.models.load import load_model, load_tokenizer
from dstune.protocols import method_of
from dstune.tasks.embedding.config import EmbeddingConfig
from dstune.trainer.data_loader import order_of
from dstune.trainer.prefetcher import dropout_seed

PROGRAM = Path(__file__).with_name("train_cases.py")
BASE = [
    *PLAIN,
    "data.max_length=64",
    "data.split.validation=0.2",
    "optimizer.lr=0.1",
    "trainer.micro_batch_size=3",
    "trainer.global_batch_size=13",  # five micro-batches, the last one of a single pair
    "trainer.max_steps=2",
    "run.export=none",
]
KINDS = {
    "reward": ["task=reward", "model=ENCODER", "data.train=PAIRS"],
    "reward-lora": ["task=reward", "model=DECODER", "data.train=PAIRS", "method=lora", "method.rank=4"],
    # The encoder has dropout: both passes over the global batch have to draw the same.
    "embedding": ["task=embedding", "model=ENCODER", "data.train=TEXTS", "task.temperature=0.2"],
    "embedding-lora": [
        *("task=embedding", "model=DECODER", "data.train=TEXTS", "method=lora", "method.rank=4", "method.dropout=0.1"),
        *("task.pooling=last", "task.symmetric=true", "task.temperature=0.3"),
    ],
}
CELLS = {
    1: [("embedding", 0)],
    2: [
        *(("reward", stage) for stage in (0, 1, 2)),
        *(("embedding", stage) for stage in (1, 3)),
        ("reward-lora", 3),
        ("embedding-lora", 3),
    ],
    3: [("reward", 3), ("embedding", 3), ("embedding-lora", 2)],
}
RESUMED = {"reward": 1, "embedding": 3}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward_embedding")
    made = {
        "model=ENCODER": f"model.path={save_encoder(folder / 'encoder')}",
        "model=DECODER": f"model.path={save_decoder(folder / 'decoder')}",
        "data.train=PAIRS": f"data.train={write_preferences(folder / 'pairs.jsonl', 40)}",
        "data.train=TEXTS": f"data.train={write_contrastive(folder / 'texts.jsonl', 60)}",
    }
    for kind, overrides in KINDS.items():
        KINDS[kind] = [made.get(text, text) for text in overrides]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSTUNE_CACHE", str(folder / "cache"))
        shop = Workshop(folder, BASE)
        cases = shop.cells(2, KINDS, CELLS[2])
        for kind, stage in RESUMED.items():
            changed = [f"zero=stage{stage}", "optimizer=adamw", "optimizer.lr=1e-2"]
            cases += shop.stopped_and_continued(kind, *KINDS[kind], *changed)
        for kind in KINDS:
            exported = ["run.export=last", "evaluate.every=1", "zero=stage3"]
            cases.append(shop.case(f"{kind}-export", *KINDS[kind], *exported))
        run_ranks(PROGRAM, 2, cases)
        yield shop


def pooled(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    rows = []
    for row, real in zip(hidden, mask.bool(), strict=True):
        rows.append(row[real].mean(dim=0) if pooling == "mean" else row[real][-1])
    return torch.stack([row / row.norm() for row in rows])


def embedding_loss(module, batches, seeds, config) -> torch.Tensor:
    """The mean over the global batch, with the graph of all of its micro-batches at once and one anchor at a time."""
    texts: dict[str, list] = {"anchor": [], "positive": [], "negative": []}
    keys: dict[str, list] = {"anchor": [], "positive": [], "negative": []}
    for batch, seed in zip(batches, seeds, strict=True):
        torch.manual_seed(seed)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        vectors = pooled(module(**inputs).last_hidden_state, batch["attention_mask"], config.task.pooling.name)
        start = 0
        for kind in texts:
            count = len(batch[f"{kind}_key"])
            texts[kind] += list(vectors[start : start + count])
            keys[kind] += batch[f"{kind}_key"].tolist()
            start += count
        assert start == len(vectors)
    tau = config.task.temperature
    losses = []
    for i, anchor in enumerate(texts["anchor"]):
        others = [
            text
            for j, text in enumerate(texts["positive"])
            if j == i or (keys["anchor"][j] != keys["anchor"][i] and keys["positive"][j] != keys["positive"][i])
        ]
        others += [
            text for text, key in zip(texts["negative"], keys["negative"], strict=True) if key != keys["positive"][i]
        ]
        near = torch.stack([(anchor * other).sum() / tau for other in others])
        loss = torch.logsumexp(near, 0) - (anchor * texts["positive"][i]).sum() / tau
        if config.task.symmetric:
            back = [
                text
                for j, text in enumerate(texts["anchor"])
                if j == i or (keys["anchor"][j] != keys["anchor"][i] and keys["positive"][j] != keys["positive"][i])
            ]
            near = torch.stack([(texts["positive"][i] * other).sum() / tau for other in back])
            loss = (loss + torch.logsumexp(near, 0) - (texts["positive"][i] * anchor).sum() / tau) / 2
        losses.append(loss)
    return torch.stack(losses).mean()


def reward_loss(module, batches, seeds, config) -> torch.Tensor:
    losses = []
    for batch, seed in zip(batches, seeds, strict=True):
        torch.manual_seed(seed)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        scores = module(**inputs).logits[:, 0]
        pairs = len(scores) // 2
        losses += [-torch.log(1 / (1 + torch.exp(scores[i + pairs] - scores[i]))) for i in range(pairs)]
    return torch.stack(losses).mean()


@pytest.fixture(scope="module")
def references(workshop) -> dict[str, tuple[list[float], list[float]]]:
    found = {}
    for kind, overrides in KINDS.items():
        config = workshop.config(*overrides).config
        tokenizer = load_tokenizer(config.model)
        data = prepare(config, tokenizer, RankEnv(0, 1, 0, 1, "test"), workshop.folder / "cache")
        module = (
            method_of(config.method).apply(load_model(config, tokenizer, (), torch.float32), config).double().train()
        )
        compute = embedding_loss if isinstance(config.task, EmbeddingConfig) else reward_loss

        def loss_of(
            step, global_batch, config=config, rows=data.train, tokenizer=tokenizer, module=module, compute=compute
        ):
            parts = global_batch.micro_batches
            assert len(parts) == 5
            batches = [batch_of(config, rows, part, tokenizer.pad_token_id) for part in parts]
            seeds = [dropout_seed(config.trainer.seed, step, part.index) for part in parts]
            return compute(module, batches, seeds, config)

        found[kind] = descend(config, order_of(config, data.train), module, loss_of)
    return found


@pytest.mark.parametrize("size", [1, 2, pytest.param(3, marks=pytest.mark.ci)])
def test_any_number_of_ranks_and_any_stage_equals_the_plain_loop(workshop, references, size):
    if size != 2:
        run_ranks(PROGRAM, size, workshop.cells(size, KINDS, CELLS[size]))
    for kind, stage in CELLS[size]:
        losses, norms = references[kind]
        rows = [row for row in workshop.rows(f"{kind}-s{stage}-n{size}") if "loss" in row]
        assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5), (kind, stage)
        assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=5e-5), (kind, stage)


@pytest.mark.parametrize("kind", RESUMED)
def test_resumed_equals_uninterrupted_to_the_bit(workshop, kind):
    assert workshop.rows(f"{kind}-whole") == workshop.rows(f"{kind}-cut")
    assert workshop.result(f"{kind}-cut")["status"] == "completed"


def held_out(workshop, kind):
    config = workshop.config(*KINDS[kind]).config
    tokenizer = load_tokenizer(config.model)
    data = prepare(config, tokenizer, RankEnv(0, 1, 0, 1, "test"), workshop.folder / "cache")
    return [data.validation.sample(number) for number in range(len(data.validation.lengths))]


def loaded(workshop, kind, auto, peft_auto):
    folder = workshop.folder / f"{kind}-export" / "export"
    loader = peft_auto if (folder / "adapter_config.json").exists() else auto
    options = {"num_labels": 1} if loader is not auto and "reward" in kind else {}
    return loader.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.mark.parametrize("kind", ["reward", "reward-lora"])
def test_an_exported_reward_model_gives_the_scores_of_the_run(workshop, kind):
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification

    model = loaded(workshop, kind, AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification)
    means = {}
    for answer, name in (("chosen", "input_ids"), ("rejected", "rejected_input_ids")):
        ids = [torch.tensor(sample[name], dtype=torch.long)[None] for sample in held_out(workshop, kind)]
        with torch.no_grad():
            scores = [float(model(input_ids=one, attention_mask=torch.ones_like(one)).logits[0, 0]) for one in ids]
        means[answer] = np.mean(scores)
    evaluated = workshop.result(f"{kind}-export")["eval_final"]
    assert evaluated["targets"] == len(held_out(workshop, kind))
    assert evaluated["reward_chosen"] == pytest.approx(means["chosen"], abs=1e-5)
    assert evaluated["reward_rejected"] == pytest.approx(means["rejected"], abs=1e-5)


def test_an_exported_embedding_model_finds_what_the_run_found(workshop):
    """In transformers by hand, and in sentence-transformers by its own pooling."""
    from transformers import AutoModel, AutoTokenizer

    sentence_transformers = pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
    folder = workshop.folder / "embedding-export" / "export"
    samples = held_out(workshop, "embedding")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def vector(ids) -> np.ndarray:
        tokens = torch.tensor(ids, dtype=torch.long)[None]
        with torch.no_grad():
            hidden = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state[0]
        return (hidden.mean(dim=0) / hidden.mean(dim=0).norm()).double().numpy()

    anchors, positives = (
        np.stack([vector(sample[name]) for sample in samples]) for name in ("input_ids", "positive_input_ids")
    )
    negatives = [vector(sample["negative_input_ids"]) for sample in samples if len(sample["negative_input_ids"])]
    candidates = np.concatenate([positives, np.stack(negatives)])
    near = anchors @ candidates.T
    ranks = [1 + int((row > row[number]).sum()) for number, row in enumerate(near)]
    evaluated = workshop.result("embedding-export")["eval_final"]
    assert evaluated["targets"] == len(samples) >= 8
    assert evaluated["mrr"] == pytest.approx(float(np.mean([1 / rank for rank in ranks])), abs=1e-9)
    for depth in (1, 5, 10):
        assert evaluated[f"recall_at_{depth}"] == pytest.approx(float(np.mean([rank <= depth for rank in ranks])))

    texts = [tokenizer.decode(sample["input_ids"]) for sample in samples]
    ours = np.stack([vector(tokenizer(text)["input_ids"]) for text in texts])
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(texts)
    assert np.abs(ours - theirs).max() < 1e-5
