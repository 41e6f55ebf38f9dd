"""The rival of `throughput.py`: a short DeepSpeed loop as one would write it by hand, on tensors that are ready in memory.

Run by `throughput.py` on every rank: `python benchmarks/handwritten.py settings.json`. Prints one JSON line on rank 0.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch
import torch.nn.functional as functional
from transformers import AutoModelForCausalLM

from dstune.train.memory import PeakMemory  # the same yardstick for both


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # not compiled by dstune either
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    # [steps, ranks, batch, sequence]
    tensors = torch.load(settings["tensors"])
    memory = PeakMemory()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["precision"]]
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype, attn_implementation="sdpa")
    if settings["method"] == "lora":
        import peft

        lora = peft.LoraConfig(r=settings["rank"], lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings["lr"], weight_decay=0.01, fused=True)
    batch_size = tensors["input_ids"].shape[2]
    config = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,
        "train_batch_size": batch_size * size,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": settings["stage"], "overlap_comm": torch.cuda.is_available()},
        "bf16": {"enabled": settings["precision"] == "bf16"},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.train()
    seconds, losses = [], []
    for step in range(settings["steps"]):
        began = time.perf_counter()
        batch = {name: values[step, rank].to(engine.device) for name, values in tensors.items()}
        labels = batch.pop("labels")
        logits = engine(**batch, use_cache=False).logits
        loss = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
        )
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
        seconds.append(time.perf_counter() - began)
    if rank == 0:
        print(json.dumps({"seconds": seconds, "losses": losses, "peak_memory_gib": memory.gib}), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)
