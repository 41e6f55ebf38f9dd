"""A rival of `throughput.py` and `compare.py`: a short DeepSpeed loop as one would write it by hand, on tensors that are
ready in memory. Run by them on every rank: `python benchmarks/handwritten.py settings.json`. Prints one JSON line.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.nn.functional as functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from dstune.trainer.memory import PeakMemory  # the same yardstick for all


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    quiet()
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    # [micro-batches of all steps, ranks, batch, sequence]
    tensors = torch.load(settings["tensors"])
    accumulated = settings.get("accumulate", 1)
    memory = PeakMemory()
    model = load(settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings["lr"], weight_decay=0.01, fused=True)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(settings, tensors["input_ids"].shape[2], size)
    )
    engine.train()
    seconds, losses, first_step_ended = [], [], 0.0
    for step in range(settings["steps"]):
        began = time.perf_counter()
        numbers = range(step * accumulated, (step + 1) * accumulated)
        micro_batches = [
            {name: values[number, rank].to(engine.device) for name, values in tensors.items()} for number in numbers
        ]
        # The mean over the targets of all ranks: a rank's share of them differs where the assistant's alone count.
        count = torch.stack([(batch["labels"][:, 1:] != -100).sum() for batch in micro_batches]).sum()
        torch.distributed.all_reduce(count)
        total = torch.zeros((), device=engine.device)
        for batch in micro_batches:
            targets = batch.pop("labels")[:, 1:].flatten()
            logits = engine(**batch, use_cache=False).logits
            loss_sum = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=-100, reduction="sum"
            )
            engine.backward(loss_sum * size * accumulated / count)  # DeepSpeed divides by the accumulation
            engine.step()
            total += loss_sum.detach()
        torch.distributed.all_reduce(total)
        losses.append(float(total / count))
        seconds.append(time.perf_counter() - began)
        first_step_ended = first_step_ended or time.time()
    report = {"seconds": seconds, "losses": losses, "first_step_ended": first_step_ended}
    print(json.dumps(report | {"peak_memory_gib": memory.gib}), flush=True)


def quiet() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # not compiled by dstune either


def load(settings: dict[str, Any]) -> PreTrainedModel:
    """Return the model, with adapters where the method asks for them."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["precision"]]
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=dtype, attn_implementation=settings.get("attention", "sdpa")
    )
    if settings.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if settings["method"] == "lora":
        import peft

        lora = peft.LoraConfig(
            r=settings["rank"], lora_alpha=settings["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
    return model


def deepspeed_config(settings: dict[str, Any], batch_size: int, ranks: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": settings.get("accumulate", 1),
        "train_batch_size": batch_size * ranks * settings.get("accumulate", 1),
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": settings["stage"], "overlap_comm": torch.cuda.is_available()},
        "bf16": {"enabled": settings["precision"] == "bf16"},
        "steps_per_print": 10**9,
    }


if __name__ == "__main__":
    main()
    os._exit(0)
