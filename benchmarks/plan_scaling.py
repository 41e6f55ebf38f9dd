"""Prints what the plan recommends from one GPU to a hundred nodes: the table of docs/scaling.md. No weights, no GPU, a minute.

python benchmarks/plan_scaling.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from dstune.config.compose import compose
from dstune.launch.plan import planned
from dstune.planning.hardware import parse
from dstune.planning.plan import as_word

RUNS = [
    ("RTX4090", 1, "llama3_8b", ["method=qlora"]),
    ("RTX4090", 1, "llama3_1b", ["method=lora"]),
    ("H100-80G", 1, "llama3_8b", ["method=lora"]),
    ("H100-80G", 1, "llama3_1b", ["method=full"]),
    ("8xH100-80G", 1, "llama3_8b", ["method=full"]),
    ("8xH100-80G", 1, "llama3_70b", ["method=lora"]),
    ("8xH100-80G", 4, "llama3_70b", ["method=full"]),
    ("8xL40S", 4, "llama3_8b", ["method=full"]),
    ("8xH100-80G", 16, "llama3_70b", ["method=full", "trainer.global_batch_size=1024"]),
    ("8xH100-80G", 100, "llama3_70b", ["method=full", "trainer.global_batch_size=3200"]),
]
"""Devices of a node, nodes, model, and what differs from `SHARED`."""
SHARED = [
    "data.train=rows.jsonl",
    "task=chat",
    "data.packing=true",
    "data.max_length=4096",
    "trainer.global_batch_size=256",
]


def main() -> None:
    print("| nodes of | model | method | rows a step | recommended | GiB a rank | tokens/s |")
    print("| --- | --- | --- | ---: | --- | ---: | ---: |")
    for hardware, nodes, model, words in RUNS:
        overrides = [*SHARED, *words]
        config = compose([f"model={model}", *overrides]).config
        best = planned(config, parse(hardware, {}, nodes)).plan.recommended
        where = f"{nodes} x {hardware}"
        start = f"| {where} | `{model}` | `{config.method.name}` | {config.trainer.global_batch_size} |"
        if best is None:
            print(f"{start} nothing fits | | |")
            continue
        settings = [f"zero.stage={best.setup.stage}"]
        settings += ["zero.hpz=true"] if best.setup.copy_ranks > 1 else []
        settings += [f"zero.offload_{part}=cpu" for part in best.offload.split("+") if part != "none"]
        settings += [f"trainer.micro_batch_size={best.setup.micro_batch_size}"]
        if best.checkpointing:
            settings.append(f"trainer.activation_checkpointing={str(as_word(best.checkpointing)).lower()}")
        print(
            f"{start} `{' '.join(settings)}` | {best.memory_gib:.1f} | {best.time.tokens_per_second:,.0f} |", flush=True
        )


if __name__ == "__main__":
    main()
