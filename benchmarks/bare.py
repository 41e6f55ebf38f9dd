"""Forward and backward passes alone, for `overhead.py`: no DeepSpeed, no optimizer, no communication. The model of
transformers as it is with a plain loss, or with what dstune changes in its passes (loss, norms, attention, freed memory that is
kept).
Run by it in as many processes as dstune has ranks: `python benchmarks/bare.py settings.json`. They wait for each other between
steps, and a step lasts as long as the slowest takes, as a step of training does. Prints one JSON line.
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

from dstune.models.attention import SamplesApart
from dstune.models.heads.language import CausalLmHead
from dstune.models.norms import use_lean_norms
from dstune.protocols import task_of
from dstune.tasks.causal_lm.config import CausalLmConfig
from dstune.trainer.memory import PeakMemory, keep_freed


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    tensors = torch.load(settings["tensors"])
    memory = PeakMemory()
    model = load(settings).train()
    head = None
    if settings["passes"] == "own":
        use_lean_norms(model)
        head = task_of(CausalLmConfig()).head(model, SamplesApart(model) if not torch.cuda.is_available() else None)
        assert isinstance(head, CausalLmHead) and head.examine(model, torch.device("cpu"))
        keep_freed()
    seconds, losses, first_step_ended = [], [], 0.0
    for _ in range(settings["steps"]):
        torch.distributed.barrier()
        began = time.perf_counter()
        total, targets = 0.0, tensors["labels"][0, rank].numel()
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
            (loss / targets).backward()
            total += float(loss.detach())
        model.zero_grad()
        losses.append(total)
        slowest = torch.tensor(time.perf_counter() - began)
        torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
        seconds.append(float(slowest))
        first_step_ended = first_step_ended or time.time()
    report = {"seconds": seconds, "losses": losses, "first_step_ended": first_step_ended}
    print(json.dumps(report | {"peak_memory_gib": memory.gib}), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)
