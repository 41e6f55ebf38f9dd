"""Forward and backward passes alone, for `overhead.py`: the model of transformers, no DeepSpeed, no optimizer, no other rank.
Run by it in as many processes as dstune has ranks: `python benchmarks/bare.py settings.json`. Prints one JSON line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as functional
from handwritten import load

from dstune.config.task_schema import CausalLmConfig
from dstune.models.heads import build_head
from dstune.train.memory import PeakMemory


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    rank = int(os.environ["RANK"])
    tensors = torch.load(settings["tensors"])
    memory = PeakMemory()
    model = load(settings).train()
    head = build_head(CausalLmConfig(), model, None) if settings["loss"] == "dstune" else None
    seconds, losses, first_step_ended = [], [], 0.0
    for _ in range(settings["steps"]):
        began = time.perf_counter()
        total = 0.0
        for micro_batch in range(settings["micro_batches"]):
            batch = {name: values[micro_batch, rank] for name, values in tensors.items()}
            if head is not None:
                loss = head(model, batch).loss_sum
            else:
                labels = batch.pop("labels")
                logits = model(**batch, use_cache=False).logits
                loss = functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
                )
            (loss / 1024).backward()
            total += float(loss.detach())
        model.zero_grad()
        losses.append(total)
        seconds.append(time.perf_counter() - began)
        first_step_ended = first_step_ended or time.time()
    report = {"seconds": seconds, "losses": losses, "first_step_ended": first_step_ended}
    print(json.dumps(report | {"peak_memory_gib": memory.gib}), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)
