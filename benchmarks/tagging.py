"""Entity F1 of `experiment=ner` beside the Trainer of transformers with the same rows and settings.

    python benchmarks/tagging.py --seeds 3
    python benchmarks/tagging.py --no-dropout

MiniLM, all weights, three epochs over 2,000 tweets, 394 held out. dstune trains on two ranks at ZeRO-3 through the command
line. The Trainer (which needs `accelerate`) is one process with its own tokenization of the words, padding, dropout and loop.
They share the rows of each step, the first weights of the head, the learning rate and its schedule, weight decay and
clipping: two shuffles and two heads differ by several points of F1 on so few entities, which says something about chance
only. Each seed is a run of both. Without dropout there is no chance left but rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dstune import samples
from dstune.config.run_file import read_run
from dstune.config.schema import RunConfig

HELD_OUT = 394
SAME_ROWS = ["data.clean.leaks=false", "data.clean.duplicates=keep", "data.clean.unicode=false"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each (default 1)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--no-dropout", action="store_true", help="in neither of them")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dstune-benchmark-"))
    try:
        files = split(folder)
        pairs = [
            pair(folder, files, seed, options.epochs, dropout=not options.no_dropout) for seed in range(options.seeds)
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers", "seqeval"))
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {packages}")
    print("| | seed | entity F1 | precision | recall | token accuracy | seconds |\n|---|---|---|---|---|---|---|")
    for seed, both in enumerate(pairs):
        for name, result in zip(("dstune, 2 ranks", "transformers Trainer"), both, strict=True):
            scores = [result[key] for key in ("entity_f1", "entity_precision", "entity_recall", "token_accuracy")]
            print(f"| {name} | {seed} | {' | '.join(f'{score:.4f}' for score in scores)} | {result['seconds']:.0f} |")
    dstune_f1, trainer_f1 = (statistics.mean(both[which]["entity_f1"] for both in pairs) for which in (0, 1))
    for seed, both in enumerate(pairs):
        apart = [
            abs(loss - trainer_loss) for loss, trainer_loss in zip(*(result["losses"] for result in both), strict=True)
        ]
        differences = ", ".join(f"{max(apart[:steps]):.4f} in {steps}" for steps in (10, 50, 100, len(apart)))
        print(f"seed {seed}: losses of steps apart by at most {differences} (the Trainer's are rounded to four digits)")
    print(f"mean entity F1: dstune {dstune_f1:.4f}, Trainer {trainer_f1:.4f}, difference {dstune_f1 - trainer_f1:+.4f}")


def split(folder: Path) -> tuple[Path, Path]:
    """Write the tweets to train on and those held out, every sixth up to HELD_OUT of them. Returns both files."""
    rows = samples.resolve("sample://ner", fetch=True).read_text(encoding="utf-8").splitlines()
    held = set(range(0, 6 * HELD_OUT, 6))
    train, validation = folder / "train.jsonl", folder / "held.jsonl"
    train.write_text("".join(f"{row}\n" for number, row in enumerate(rows) if number not in held), encoding="utf-8")
    validation.write_text("".join(f"{rows[number]}\n" for number in sorted(held)), encoding="utf-8")
    return train, validation


def pair(
    folder: Path, files: tuple[Path, Path], seed: int, epochs: int, *, dropout: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    run_dir = folder / f"run-{seed}"
    data = [f"data.train={files[0]}", f"data.validation={files[1]}", *SAME_ROWS]
    overrides = ["trainer.precision=fp32", f"trainer.seed={seed}", f"trainer.epochs={epochs}", "run.export=none"]
    if not dropout:
        overrides.append("model.config_overrides={hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}")
    command = [sys.executable, "-m", "dstune", "train", "experiment=ner", *data, *overrides, f"run.dir={run_dir}"]
    subprocess.run(command, check=True)
    result = json.loads((run_dir / "result.json").read_text())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    dstune_result = result["eval_final"] | {"seconds": result["seconds"], "losses": losses}
    trainer_result = trainer(read_run(run_dir / "run.yaml").config, files, folder / f"trainer-{seed}")
    print(
        f"seed {seed}: entity F1 {dstune_result['entity_f1']:.4f}, Trainer {trainer_result['entity_f1']:.4f}",
        flush=True,
    )
    return dstune_result, trainer_result


def trainer(config: RunConfig, files: tuple[Path, Path], folder: Path) -> dict[str, Any]:
    """Return the recipe of the transformers documentation: words split into sub-words, the first one with the label."""
    import numpy as np
    import torch
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score
    from transformers import (
        AutoModelForTokenClassification,
        AutoTokenizer,
        DataCollatorForTokenClassification,
        Trainer,
        TrainingArguments,
    )

    from dstune.core.paths import cache_root
    from dstune.core.rank_env import RankEnv
    from dstune.data.build import prepare
    from dstune.models.load import initialize_weights
    from dstune.protocols import schedule_of
    from dstune.trainer.data_loader import order_of

    began = time.perf_counter()
    train, held = ([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files)
    path = samples.resolve(config.model.path, fetch=False)
    tokenizer = AutoTokenizer.from_pretrained(path)
    data = prepare(config, tokenizer, RankEnv(0, 1, 0, 1, "benchmark"), cache_root())
    labels = list(data.labels)
    model = AutoModelForTokenClassification.from_pretrained(
        path, num_labels=len(labels), **config.model.config_overrides
    )
    initialize_weights(model, ("classifier.weight", "classifier.bias"), config.trainer.seed)

    def encoded(row: dict[str, Any]) -> dict[str, Any]:
        inputs = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=config.data.max_length)
        words = inputs.word_ids()
        first = [
            word is not None and word != word_before for word, word_before in zip(words, [None, *words], strict=False)
        ]
        tags = [
            labels.index(row["tags"][word]) if is_first else -100 for word, is_first in zip(words, first, strict=True)
        ]
        return {**inputs, "labels": tags}

    rows = [encoded(row) for row in train]
    assert all(data.train.table[at]["input_ids"] == row["input_ids"] for at, row in enumerate(rows)), "other tokens"
    order = order_of(config, data.train)
    global_batches = [order.global_batch(*order.locate(step)) for step in range(order.steps(config.trainer.epochs))]
    batches = [
        [int(sample) for part in global_batch.micro_batches if not part.filler for sample in part.samples]
        for global_batch in global_batches
    ]

    class Alike(Trainer):
        """Rows in dstune's order, and its schedule: the Trainer's own has a first step at a rate of zero."""

        def get_train_dataloader(self) -> torch.utils.data.DataLoader:
            return torch.utils.data.DataLoader(rows, batch_sampler=batches, collate_fn=self.data_collator)

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: schedule_of(config.schedule).factor(step, len(batches))
            )
            self._created_lr_scheduler = True
            return self.lr_scheduler

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=len(batches),
        per_device_eval_batch_size=64,
        learning_rate=config.optimizer.lr,
        weight_decay=config.optimizer.weight_decay,
        logging_steps=1,
        max_grad_norm=config.trainer.grad_clip,
        seed=config.trainer.seed,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    run = Alike(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
    )
    run.train()
    prediction = run.predict([encoded(row) for row in held])
    counted = [label_ids != -100 for label_ids in prediction.label_ids]
    guessed = np.argmax(prediction.predictions, axis=-1)
    names = np.array(labels)
    true, predicted = (
        [names[row[mask]].tolist() for row, mask in zip(table, counted, strict=True)]
        for table in (prediction.label_ids, guessed)
    )
    return {
        "entity_f1": f1_score(true, predicted),
        "entity_precision": precision_score(true, predicted),
        "entity_recall": recall_score(true, predicted),
        "token_accuracy": accuracy_score(true, predicted),
        "seconds": time.perf_counter() - began,
        "losses": [row["loss"] for row in run.state.log_history if "loss" in row],
    }


if __name__ == "__main__":
    main()
