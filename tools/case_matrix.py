"""The cases of `side_by_side.py` and of the placement tests: every task x method x stage, variants, wrong configurations, and the
tiny models and rows that they need."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools.case_server import Case

HOME = Path(__file__).resolve().parents[1]
WRONG = HOME / "tools" / "wrong_configurations.txt"
STAGES = (0, 1, 2, 3)

COMMON = [
    *("launch.processes=1", "run.dir=run", "run.name=side", "trainer.precision=fp32", "trainer.micro_batch_size=2"),
    *("trainer.global_batch_size=8", "trainer.max_steps=3", "optimizer.lr=1e-2", "data.max_length=48"),
    *("checkpoint.every=2", "evaluate.every=2", "zero.param_persistence_threshold=0"),
]
# Otherwise an export has the day it was made on, and results that are kept differ from those of the next day.
DAY = "task.template_date=2026-01-01"
TASKS: dict[str, list[str]] = {
    "chat": [
        DAY,
        "model.path=MODELS/decoder",
        "data.train=DATA/chat.jsonl",
        "evaluate.samples=1",
        "evaluate.max_new_tokens=3",
    ],
    "causal_lm": ["model.path=MODELS/decoder", "data.train=DATA/texts.jsonl"],
    "classification": ["model.path=MODELS/encoder", "data.train=DATA/labelled.jsonl"],
    "preference": [DAY, "model.path=MODELS/decoder", "data.train=DATA/preferences.jsonl"],
    "reward": [DAY, "model.path=MODELS/decoder", "data.train=DATA/preferences.jsonl"],
    "embedding": ["model.path=MODELS/encoder", "data.train=DATA/contrastive.jsonl"],
    "token_classification": ["model.path=MODELS/encoder", "data.train=DATA/tagged.jsonl", "task.stride=8"],
    "question_answering": ["model.path=MODELS/encoder", "data.train=DATA/questions.jsonl", "task.stride=8"],
    "seq2seq": [DAY, "model.path=MODELS/t5", "data.train=DATA/pairs.jsonl", "evaluate.generate_rows=2"],
}
METHODS: dict[str, list[str]] = {
    "full": [],
    "head": [],
    "lora": ["method.rank=4"],
    "features": ["method.layers=1", "method.logistic_regression=true"],
    "freeze": ["method.embeddings=true", "method.first_layers=1"],
    "ulmfit": ["method.unfreeze_steps=1"],
    "importance": ["method.score_steps=2"],
    # Blocks of 64 weights share a scale, and the T5 of seq2seq has tied weights that cannot be halved.
    "qlora": ["method.rank=4", "model.path=MODELS/wide"],
    "ia3": [],
    "vera": ["method.rank=8"],
    "oft": ["method.block_size=8"],
    "prompt": ["method.virtual_tokens=4"],
    "prefix": ["method.virtual_tokens=4"],
    "p_tuning": ["method.virtual_tokens=4", "method.encoder_size=16"],
}
PLAIN_ENCODER = "model.path=MODELS/wide_encoder"
QLORA_MODELS = {
    **dict.fromkeys(("classification", "embedding", "token_classification", "question_answering"), PLAIN_ENCODER),
    "seq2seq": "model.path=MODELS/wide_t5",
}
VARIANTS: dict[str, list[str]] = {
    "regression": ["task=classification", "task.regression=true", "data.train=DATA/scored.jsonl"],
    "focal": ["task=classification", "task.focal_gamma=2", "task.balanced=true"],
    "ulmfit-language-model": [
        "task=classification",
        "method=ulmfit",
        "method.language_model_epochs=1",
        "trainer.epochs=2",
    ],
    "slices": ["task=question_answering", "evaluate.slices=[source]", "evaluate.min_slice_rows=1"],
    "no-answer": ["task=question_answering", "task.no_answer=true", "data.train=DATA/unanswered.jsonl"],
    "orpo": ["task=preference", "task.loss=orpo"],
    "simpo": ["task=preference", "task.loss=simpo"],
    "ipo": ["task=preference", "task.loss=ipo", "method=lora"],
    "kto": ["task=preference", "task.loss=kto"],
    "symmetric": ["task=embedding", "task.symmetric=true", "task.pooling=cls"],
    "decoder-seq2seq": ["task=seq2seq", "model.path=MODELS/decoder"],
    "bart": ["task=seq2seq", "model.path=MODELS/bart"],
    "dora": ["task=chat", "method=lora", "method.dora=true", "method.lr_ratio=4"],
    "pissa": ["task=chat", "method=lora", "method.rank=4", "method.init=pissa"],
    "importance-tensors": ["task=classification", "method=importance", "method.unit=tensors", "method.share=0.3"],
    "layer-decay": ["task=classification", "method.layer_decay=0.8", "schedule=slanted_triangular"],
    "sgd": ["task=chat", "optimizer=sgd", "schedule=linear", "optimizer.momentum=0.9"],
    "stable-decay": ["task=chat", "schedule=warmup_stable_decay"],
    "replay": ["task=causal_lm", "forgetting.replay=0.3", "forgetting.general=DATA/general.jsonl"],
    "l2sp": ["task=classification", "forgetting.l2sp=0.1"],
    "ewc": ["task=causal_lm", "forgetting.ewc=10", "forgetting.ewc_rows=8", "forgetting.general=DATA/general.jsonl"],
    "mixture": [
        *("task=chat", "data.mixture.a.path=DATA/chat.jsonl", "data.mixture.b.path=DATA/texts.jsonl"),
        *("data.mixture.b.task=causal_lm", "data.mixture.b.weight=2", "data.train=null"),
    ],
    "selective": ["task=causal_lm", "trainer.activation_checkpointing=selective"],
    "spikes": ["task=chat", "trainer.spike.action=skip", "trainer.early_stopping.patience=1"],
    "bf16": ["task=chat", "trainer.precision=bf16"],
}
"""Settings that take another path through the code than the pairs do."""


def pairs(only: Sequence[str], stages: Sequence[int], ranks: int, folder: Path, *, rotate: bool) -> Iterator[Case]:
    """Yield every task x method x stage, and the variants; `only` keeps the names that contain one of its words."""
    number = 0
    for task, of_task in TASKS.items():
        for method, of_method in METHODS.items():
            further = [QLORA_MODELS[task]] if method == "qlora" and task in QLORA_MODELS else []
            chosen = [stages[number % len(stages)]] if rotate else stages
            number += 1
            for stage in chosen:
                words = [f"task={task}", f"method={method}", *of_task, *of_method, *further]
                if matched := case(f"{task}-{method}-{stage}", words, stage, ranks, folder, only):
                    yield matched
    for name, words in VARIANTS.items():
        task = next(word for word in words if word.startswith("task=")).removeprefix("task=")
        chosen = [stages[number % len(stages)]] if rotate else stages
        number += 1
        for stage in chosen:
            if matched := case(f"{name}-{stage}", [*TASKS[task], *words], stage, ranks, folder, only):
                yield matched


def case(name: str, words: list[str], stage: int, ranks: int, folder: Path, only: Sequence[str]) -> Case | None:
    parts = name.split("-")
    if only and not all(part in parts or part == "-".join(parts[:-1]) for part in only):
        return None
    defaults = [word for word in COMMON if not (stage < 3 and word.startswith("zero."))]
    if any(word.startswith("trainer.epochs=") for word in words):
        defaults = [word for word in defaults if not word.startswith("trainer.max_steps=")]
    last = {
        word.partition("=")[0]: word
        for word in (*words, *defaults)
        if word not in defaults or word.partition("=")[0] not in {other.partition("=")[0] for other in words}
    }
    argv = [*last.values(), f"zero=stage{stage}"]
    argv = [word.replace("MODELS", str(folder / "models")).replace("DATA", str(folder / "data")) for word in argv]
    return Case(name, ["train", *argv], ranks if stage >= 2 else 1)


def wrong_configurations() -> Iterator[Case]:
    for number, line in enumerate(WRONG.read_text(encoding="utf-8").splitlines(), 1):
        if line and not line.startswith("#"):
            yield Case(f"wrong-{number}", ["train", *shlex.split(line), "--json"], 0)


def make_inputs(folder: Path) -> None:
    """Write tiny models and rows, once for both trees, with the makers of the tests."""
    if (folder / "inputs-made").exists():
        return
    from tests.support import tiny

    models, data = folder / "models", folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    tiny.save_decoder(models / "decoder")
    tiny.save_encoder(models / "encoder")
    tiny.save_decoder(models / "wide", hidden_size=64, intermediate_size=128)
    tiny.save_encoder(models / "wide_encoder", hidden_size=64, intermediate_size=128)
    tiny.save_t5(models / "t5")
    tiny.save_t5(models / "wide_t5", d_model=64, d_kv=16, d_ff=128)
    tiny.save_bart(models / "bart")
    tiny.write_dialogues(data / "chat.jsonl", 40)
    tiny.write_labelled(data / "labelled.jsonl", 40)
    tiny.write_preferences(data / "preferences.jsonl", 40)
    tiny.write_contrastive(data / "contrastive.jsonl", 40)
    tiny.write_tagged(data / "tagged.jsonl", 40)
    tiny.write_questions(data / "questions.jsonl", 40)
    tiny.write_questions(data / "unanswered.jsonl", 40, unanswered=0.4)
    tiny.write_pairs(data / "pairs.jsonl", 40)
    tiny.write_scored(data / "scored.jsonl", 40)
    for name, seed in (("texts", 0), ("general", 7)):
        tiny.write_scored(data / f"{name}.scored", 40, seed=seed)
        rows = [json.loads(line) for line in (data / f"{name}.scored").read_text().splitlines()]
        lines = [json.dumps({"text": row["text"]}) for row in rows]
        (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "inputs-made").touch()
