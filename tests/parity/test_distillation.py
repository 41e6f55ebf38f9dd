"""Distillation on 1, 2 and 3 ranks at ZeRO 0 to 3 = a plain loop with whole logits, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from parity.reference import descend
from support.ranks import run_ranks
from support.tiny import WORDS, _save_model, save_decoder, write_dialogues
from support.workshop import PLAIN, Workshop
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from dstune.core.rank_env import RankEnv
from dstune.data.build import prepare
from dstune.data.sampler import GlobalBatch
from dstune.evaluation import command as evaluate
from dstune.models.load import load_model, load_tokenizer
from dstune.protocols import method_of
from dstune.trainer.data_loader import order_of

PROGRAM = Path(__file__).with_name("train_cases.py")
BASE = [
    *PLAIN,
    "task=distillation",
    "data.max_length=64",
    "data.split.validation=0.2",
    "optimizer.lr=0.5",
    "trainer.micro_batch_size=2",
    "trainer.global_batch_size=9",
    "trainer.max_steps=3",
    "evaluate.samples=0",
    "run.export=none",
]
LORA = ["method=lora", "method.rank=4", "trainer.global_batch_size=3"]
KINDS = {
    "forward": ["task.beta=0", "data.packing=false"],
    "reverse": ["task.beta=1", "task.temperature=1.7", "trainer.global_batch_size=3"],
    "between": ["task.beta=0.3", "task.temperature=0.9", "task.text_weight=0.4", "data.packing=false"],
    "packed": ["task.beta=0.5", "trainer.global_batch_size=3"],
    "lora": ["task.beta=0.5", *LORA],
    "itself": [*LORA, "task.teacher=null", "task.text_weight=0.6", "optimizer.lr=0.1"],
    "projection": ["task.beta=0.3", "method=lora", "method.rank=4", "method.target_modules=[q_proj,lm_head]"],
    "capped": ["task.beta=0.5", "model.path={folder}/capped", "task.teacher={folder}/scaled", "data.packing=false"],
    "own": ["task.beta=0.5", "task.on_policy=0.765", "task.max_new_tokens=9", "trainer.global_batch_size=3"],
    "kept": ["task.beta=0.5", "task.teacher_cache=true", "trainer.global_batch_size=3"],
    "kept-padded": ["task.beta=0.3", "task.teacher_cache=true", "data.packing=false", "method=lora", "method.rank=4"],
    "text": ["task.beta=0", "data.train={folder}/texts.jsonl", "trainer.global_batch_size=3"],
}
CELLS = {
    1: [("forward", 0), ("capped", 2), ("text", 0), ("kept", 0)],
    2: [
        ("forward", 3),
        ("reverse", 1),
        ("between", 2),
        ("packed", 3),
        ("lora", 3),
        ("projection", 3),
        ("projection", 0),
        ("capped", 3),
        ("own", 0),
        ("own", 3),
        ("kept", 3),
        ("kept-padded", 2),
        ("itself", 3),
        ("itself", 0),
    ],
    3: [("between", 3), ("lora", 2), ("packed", 0), ("own", 2), ("kept-padded", 3)],
}
RESUMED = {"packed": 3, "lora": 2, "own": 2, "kept": 2}


def save_capped(folder: Path) -> None:
    """A student whose logits are capped, and a teacher whose logits are scaled, with rows that stand for no token."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2}
    sizes |= {"bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 2}
    tokens = 8 + len(WORDS)
    capped = Gemma2Config(**sizes, vocab_size=tokens, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0)
    _save_model(folder / "capped", 1, Gemma2ForCausalLM, capped)
    _save_model(
        folder / "scaled", 2, GraniteForCausalLM, GraniteConfig(**sizes, vocab_size=tokens + 8, logits_scaling=3.0)
    )


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distillation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSTUNE_CACHE", str(folder / "cache"))
        save_capped(folder)
        texts = [{"text": " ".join(WORDS[n * k % 96] for k in range(1, 5 + n % 30))} for n in range(60)]
        (folder / "texts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in texts))
        sources = [
            f"model.path={save_decoder(folder / 'model')}",
            f"task.teacher={save_decoder(folder / 'teacher', seed=1, hidden_size=48)}",
            f"data.train={write_dialogues(folder / 'chats.jsonl', 60)}",
        ]
        shop = Workshop(folder, [*BASE, *sources])
        cases = shop.cells(2, kinds(folder), CELLS[2])
        for kind, stage in RESUMED.items():
            changed = [f"zero=stage{stage}", "optimizer=adamw", "optimizer.lr=1e-2"]
            cases += shop.stopped_and_continued(kind, *KINDS[kind], *changed)
        run_ranks(PROGRAM, 2, cases)
        yield shop


def kinds(folder: Path) -> dict[str, list[str]]:
    return {kind: [override.format(folder=folder) for override in overrides] for kind, overrides in KINDS.items()}


def divergence(own: torch.Tensor, taught: torch.Tensor, beta: float) -> torch.Tensor:
    """Of one target, from probabilities."""

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p * (p / q).log()).sum()

    if beta in (0, 1):
        return kl(taught, own) if beta == 0 else kl(own, taught)
    mixture = beta * taught + (1 - beta) * own
    return beta * kl(taught, mixture) + (1 - beta) * kl(own, mixture)


class Plain:
    """The mean loss of a global batch, one sample and one target after the other."""

    def __init__(self, config, student, teacher, split, run: Path | None = None):
        """run: of which the answers are taken, where it trained on its own ones."""
        self.task, self.student, self.teacher, self.split, self.run = config.task, student, teacher, split, run

    def sample(self, index: int) -> list[torch.Tensor]:
        sample = self.split.sample(index)
        return self.of_tokens(sample["input_ids"].tolist(), sample["labels"].tolist())

    def answered(self, answer: dict) -> list[torch.Tensor]:
        """The losses of an answer of the student, which stands in place of the last one of its row."""
        sample = self.split.sample(answer["prompt"])
        labels = sample["labels"].tolist()
        last = max(place for place, label in enumerate(labels) if label != -100)
        start = max(place for place, label in enumerate(labels[:last]) if label == -100) + 1
        ids = [*sample["input_ids"][:start].tolist(), *answer["ids"]]
        return self.of_tokens(ids, [-100] * start + answer["ids"])

    def of_tokens(self, ids: list[int], labels: list[int]) -> list[torch.Tensor]:
        tokens = torch.tensor(ids)[None]
        own = self.student(input_ids=tokens, use_cache=False).logits[0]
        with torch.no_grad():
            taught = self.teacher(input_ids=tokens, use_cache=False).logits[0, :, : own.shape[-1]]
        losses = []
        for place in range(1, len(labels)):
            if labels[place] == -100:
                continue
            at, tau = place - 1, self.task.temperature
            apart = divergence((own[at] / tau).softmax(0), (taught[at] / tau).softmax(0), self.task.beta)
            text = -own[at].log_softmax(0)[labels[place]]
            losses.append((1 - self.task.text_weight) * apart + self.task.text_weight * text)
        return losses

    def global_batch(self, step: int, batch: GlobalBatch) -> torch.Tensor:
        answers = self.run / "rollouts" / f"step-{step + 1:06d}.jsonl" if self.run is not None else None
        if answers is not None and answers.exists():
            rows = [json.loads(line) for line in answers.read_text().splitlines()]
            return torch.stack([loss for row in rows for loss in self.answered(row)]).mean()
        samples = [index for part in batch.micro_batches for row in part.rows for index in row if not part.filler]
        return torch.stack([loss for index in samples for loss in self.sample(index)]).mean()


def reference(workshop: Workshop, kind: str, run: Path | None = None) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the plain loop."""
    config = workshop.config(*kinds(workshop.folder)[kind]).config
    tokenizer = load_tokenizer(config.model)
    data = prepare(config, tokenizer, RankEnv(0, 1, 0, 1, "test"), workshop.folder / "cache")
    student = load_model(config, tokenizer, (), torch.float32)
    student = method_of(config.method).apply(student, config).double()
    teacher = AutoModelForCausalLM.from_pretrained(config.task.teacher or config.model.path, dtype=torch.float64).eval()
    plain = Plain(config, student, teacher, data.train, run)
    return descend(config, order_of(config, data.train), student, plain.global_batch)


@pytest.fixture(scope="module")
def references(workshop):
    return {kind: reference(workshop, kind) for kind in KINDS if kind != "own"}


@pytest.mark.parametrize("size", [2, 1, 3])
def test_any_number_of_ranks_and_any_stage_equals_the_plain_loop(workshop, references, size):
    if size != 2:
        run_ranks(PROGRAM, size, workshop.cells(size, kinds(workshop.folder), CELLS[size]))
    for kind, stage in CELLS[size]:
        run = workshop.folder / f"{kind}-s{stage}-n{size}"
        losses, norms = reference(workshop, kind, run) if kind == "own" else references[kind]
        rows = [row for row in workshop.rows(run.name) if "loss" in row]
        assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-6), (kind, stage)
        assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=2e-6), (kind, stage)
        assert min(norms) > 1e-2 and losses[2] != losses[0], "there is something to learn"


def test_a_share_of_the_steps_is_on_own_answers(workshop):
    """Which ones follows from the seed alone; a step's answers are of all its samples."""
    steps = {path.name for path in (workshop.folder / "own-s0-n2" / "rollouts").iterdir()}
    assert 0 < len(steps) < 3
    assert steps == {path.name for path in (workshop.folder / "own-s3-n2" / "rollouts").iterdir()}
    rows = {row["step"]: row for row in workshop.rows("own-s0-n2") if "loss" in row}
    for step in rows:
        assert ("completions/mean_length" in rows[step]) == (f"step-{step:06d}.jsonl" in steps)


@pytest.mark.parametrize("kind", RESUMED)
def test_resumed_equals_uninterrupted_to_the_bit(workshop, kind):
    assert workshop.result(f"{kind}-cut")["status"] == "completed"
    assert workshop.rows(f"{kind}-whole") == workshop.rows(f"{kind}-cut")


def test_what_a_teacher_says_is_kept_for_later_runs(workshop):
    (entry,) = (entry for entry in (workshop.folder / "cache" / "teachers").iterdir() if entry.is_dir())
    states = np.load(entry / "train.npy")
    assert states.dtype == np.float32 and states.shape[1] == 48 and np.abs(states).max(axis=1).min() > 0
    later = workshop.folder / "kept-whole" / "run.yaml"
    assert (entry / "train.npy").stat().st_mtime < later.stat().st_mtime


def test_evaluations_tell_the_text_from_the_teacher(workshop, capsys):
    run = workshop.folder / "lora-s3-n2"
    final = workshop.result(run.name)["eval_final"]
    assert final["text_loss"] > final["loss"] > 0
    assert final["teacher_text_loss"] > 0
    assert evaluate.main([str(run), "--json", "launch.processes=1"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == pytest.approx(final, rel=1e-4)
