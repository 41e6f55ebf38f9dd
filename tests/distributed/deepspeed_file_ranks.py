"""Program on one rank: prints what DeepSpeed's own engine makes of each file, in which nothing is `auto` any more."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from support.ranks import end_with, start_rank

STEPS = 40


def facts(content: dict[str, Any]) -> dict[str, Any]:
    """Return batch, clipping, precision and the rate of each step, all read from an engine."""
    is_fp16 = DeepSpeedConfig(dict(content)).float16_config.enabled
    if is_fp16:  # which an engine refuses on a CPU
        content = content | {"fp16": {"enabled": False}}
    model = torch.nn.Linear(4, 4)
    of_script = None if "optimizer" in content else torch.optim.SGD(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=of_script,
        model_parameters=model.parameters(),
        config=content | {"zero_allow_untested_optimizer": True},
    )
    dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[next(engine.module.parameters()).dtype]
    rates = []
    for _ in range(STEPS):
        rates.append(engine.optimizer.param_groups[0]["lr"])
        for _ in range(engine.gradient_accumulation_steps()):
            row = torch.ones(1, 4, dtype=next(engine.module.parameters()).dtype)
            engine.backward(engine(row).float().sum())
            engine.step()
    return {
        "batch": [
            engine.train_batch_size(),
            engine.train_micro_batch_size_per_gpu(),
            engine.gradient_accumulation_steps(),
        ],
        "clip": engine.gradient_clipping(),
        "precision": "fp16" if is_fp16 else dtype,
        "rates": rates,
    }


def main() -> None:
    start_rank()
    for name, content in json.loads(Path(json.loads(sys.argv[1])).read_text()).items():
        print("FACTS " + json.dumps([name, facts(content)]), flush=True)


if __name__ == "__main__":
    end_with(main)
