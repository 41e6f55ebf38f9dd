"""Two rivals of `compare.py`: TRL's SFTTrainer and the `transformers` Trainer, each on DeepSpeed, with the same packed rows
in the same order. Run on every rank: `python benchmarks/trainers.py settings.json trl|transformers`. Prints one JSON line.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
from datasets import Dataset
from handwritten import deepspeed_config, load, quiet
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from dstune.trainer.memory import PeakMemory  # the same yardstick for all


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.first_step_ended = 0.0
        self._began = 0.0

    def on_train_begin(self, *unused: Any, **keywords: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *unused: Any, **keywords: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._began)
        self._began = now
        self.first_step_ended = self.first_step_ended or time.time()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **keywords: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def main() -> None:
    settings, side = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    quiet()
    if side == "trl":
        import trl  # before the level that memory is measured from, as all imports are
    on_gpu = torch.cuda.is_available()
    # At ZeRO-3 loading asks DeepSpeed how many ranks there are.
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", verbose=False)
    tensors = torch.load(settings["tensors"])
    # In the order of steps, ranks and batches: accelerate gives each rank every second batch.
    rows = Dataset.from_dict({name: values.flatten(0, 2).tolist() for name, values in tensors.items()})
    rows_a_rank = tensors["input_ids"].shape[2]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = {
            "output_dir": scratch,
            "use_cpu": not on_gpu,
            "ddp_backend": "nccl" if on_gpu else "gloo",
            "deepspeed": deepspeed_config(settings, rows_a_rank, int(os.environ["WORLD_SIZE"])),
            "bf16": settings["precision"] == "bf16",
            "per_device_train_batch_size": rows_a_rank,
            "max_steps": settings["steps"],
            "learning_rate": settings["lr"],
            "weight_decay": 0.01,
            "max_grad_norm": 1.0,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch_fused",
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }
        # DeepSpeed is told of by the arguments, which have to be there before the model is loaded.
        if side == "trl":
            further = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
            training_arguments: Any = trl.SFTConfig(**arguments, **further)
        else:
            training_arguments = TrainingArguments(**arguments)
        memory, clock = PeakMemory(), Clock()
        model = load(settings)
        model.config.use_cache = False  # packed rows contaminate each other with a cache
        common = {"args": training_arguments, "train_dataset": rows.with_format("torch"), "callbacks": [clock]}
        if side == "trl":
            tokenizer = AutoTokenizer.from_pretrained(settings["model"])
            trainer: Any = trl.SFTTrainer(model, processing_class=tokenizer, data_collator=collate, **common)
        else:
            trainer = Trainer(model, data_collator=collate, **common)
        trainer.train()
    report = {"seconds": clock.seconds, "losses": clock.losses, "first_step_ended": clock.first_step_ended}
    print(json.dumps(report | {"peak_memory_gib": memory.gib}), flush=True)


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


if __name__ == "__main__":
    main()
    os._exit(0)
