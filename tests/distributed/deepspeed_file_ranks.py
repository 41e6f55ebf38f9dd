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
    muon = {
        key: value
        for group in engine.optimizer.param_groups
        if "use_muon" in group
        for key, value in group.items()
        if key in ("momentum", "betas", "eps", "weight_decay")
    }
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
        "muon": muon,
    }


def muon_updates() -> list[float]:
    """Return the sizes of the first update of a matrix, of a loss and of 100 times that loss, clipped at 1."""
    sizes = []
    for scale in (1.0, 100.0):
        torch.manual_seed(0)
        model = torch.nn.Linear(16, 16)
        before = model.weight.detach().clone()
        settings = {
            "train_batch_size": 1,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "Muon", "params": {"lr": 0.01, "torch_adam": True}},
            "zero_optimization": {"stage": 1, "reduce_scatter": False},
        }
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
        engine.backward(engine(torch.ones(1, 16)).pow(2).sum() * scale)
        engine.step()
        sizes.append(float((model.weight.detach() - before).norm()))
    return sizes


def main() -> None:
    start_rank()
    torch._dynamo.config.disable = True  # DeepSpeed's Muon would be compiled for each shape
    print("FACTS " + json.dumps(["updates of Muon", muon_updates()]), flush=True)
    for name, content in json.loads(Path(json.loads(sys.argv[1])).read_text()).items():
        print("FACTS " + json.dumps([name, facts(content)]), flush=True)


if __name__ == "__main__":
    end_with(main)
