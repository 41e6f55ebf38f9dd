"""Trains with transformers' Trainer (or TRL's SFTTrainer) and DeepSpeed: a program for `run_ranks`.

Every rank writes the losses and the row numbers of its micro-batches, by optimizer step, to `OUT/rank-N.json`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    case = json.loads(sys.argv[1])
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    deepspeed.init_distributed("gloo", verbose=False)
    out, rank = Path(case["out"]), int(os.environ["RANK"])
    rows = [json.loads(line) for line in Path(case["rows"]).read_text().splitlines()]
    numbers: dict[str, int] = {}
    record: dict[int, dict[str, list[Any]]] = {}

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        padded = [row["input_ids"] + [2] * (longest - len(row["input_ids"])) for row in batch]
        counted = [row["labels"] + [-100] * (longest - len(row["input_ids"])) for row in batch]
        mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch]
        return {
            "input_ids": torch.tensor(padded),
            "labels": torch.tensor(counted),
            "attention_mask": torch.tensor(mask),
        }

    def recording(base: type) -> type:
        class Recording(base):  # type: ignore[misc]
            def training_step(self, model: Any, inputs: Any, *further: Any) -> torch.Tensor:
                loss = super().training_step(model, inputs, *further)
                entry = record.setdefault(self.state.global_step + 1, {"loss": [], "rows": []})
                entry["loss"].append(float(loss))
                for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
                    entry["rows"].append(numbers[json.dumps(ids[mask.bool()].tolist())])
                return loss

        return Recording

    class Rates(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "learning_rate" in (logs or {}):
                record[state.global_step]["rate"] = logs["learning_rate"]

    settings = {
        "output_dir": str(out / "trainer"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "deepspeed": case["deepspeed"],
        "disable_tqdm": True,
        **case["arguments"],
    }
    model = None
    if case.get("trl"):
        from trl import SFTConfig, SFTTrainer

        arguments: Any = SFTConfig(**settings)
        trainer_class: type = SFTTrainer
    else:
        arguments = TrainingArguments(**settings)
        trainer_class = Trainer
    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32)
    further: dict[str, Any] = {}
    if lora := case.get("lora"):
        from peft import LoraConfig, get_peft_model

        if case.get("trl"):
            further["peft_config"] = LoraConfig(**lora)
        else:
            model = get_peft_model(model, LoraConfig(**lora))
    if case.get("trl"):
        import datasets

        dataset: Any = datasets.Dataset.from_list(rows)
    else:
        dataset = rows
    tokenizer = AutoTokenizer.from_pretrained(case["model"])
    trainer = recording(trainer_class)(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collate if "input_ids" in rows[0] else None,
        processing_class=tokenizer,
        callbacks=[Rates()],
        **further,
    )
    numbers |= {json.dumps(list(row["input_ids"])): number for number, row in enumerate(trainer.train_dataset)}
    trainer.train()
    (out / f"rank-{rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
