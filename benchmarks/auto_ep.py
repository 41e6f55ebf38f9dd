"""DeepSpeed's AutoEP (a rank holds some of the experts) beside a plain loop, on two ranks of a CPU.

    python benchmarks/auto_ep.py [--stage 0] [--as-it-is] [--off]

DeepSpeed 0.19.8 does not start it with transformers 5.24: it looks into a registry of router outputs that has another form by now.
Nothing here asks for these outputs, so this step is left out, unless --as-it-is.
With --off the experts stay on every rank, as a control of this program.

A tiny Qwen 3 MoE in fp32, three steps of SGD. Prints for each step the loss of both, and the largest difference of dense
weights and of experts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

STEPS, ROWS, LENGTH, RATE, RANKS = 3, 4, 24, 0.5, 2


def build() -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "head_dim": 8,
        "norm_topk_prob": True,
    }
    config = AutoConfig.for_model("qwen3_moe", **sizes, **experts, num_key_value_heads=2, initializer_range=0.1)
    config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_config(config)


def batches() -> Any:
    import torch

    return torch.randint(0, 96, (STEPS, ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def train_plainly(steps: int) -> dict[str, Any]:
    import torch

    model, losses = build(), []
    for ids in batches()[:steps]:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
                parameter.grad = None
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name in [name for name in weights if name.endswith("gate_up_proj")]:  # as AutoEP has them
        weights[name.replace("gate_up_proj", "w1")], weights[name.replace("gate_up_proj", "w3")] = weights[name].chunk(
            2, 1
        )
    for name in [name for name in weights if name.endswith("experts.down_proj")]:
        weights[name.replace("down_proj", "w2")] = weights[name]
    return {"losses": losses, "weights": weights}


def compare(engine: Any, steps: int) -> dict[str, tuple[float, str]]:
    """The largest differences from the plain loop's weights after so many steps: of dense weights, routers and this rank's
    experts, each with the weight that has it."""
    plain, largest = train_plainly(steps)["weights"], {}
    for name, parameter in engine.module.named_parameters():
        expected = plain.get(name.replace("router.gate", "gate"))
        if expected is None:
            print(f"not compared: {name} {tuple(parameter.shape)}")
            continue
        kind = "experts" if ".experts." in name else "router" if "gate.weight" in name else "dense"
        difference = float((expected[: len(parameter)] - parameter.detach()).abs().max())
        largest[kind] = max(largest.get(kind, (0.0, "")), (difference, name))
    return largest


def run_rank(stage: int, *, as_it_is: bool, off: bool) -> None:
    import deepspeed
    import torch

    from dstune.core.rank_env import RankEnv
    from dstune.zero.start import start_process_group

    rank = int(os.environ["RANK"])
    start_process_group(RankEnv(rank, RANKS, rank, RANKS, "auto_ep"))
    if not as_it_is:
        from deepspeed.module_inject.auto_ep_presets import base

        base._install_instance_transformers_output_recorders = lambda *_: True
    model = build()
    settings = {
        "train_micro_batch_size_per_gpu": ROWS // RANKS,
        "train_batch_size": ROWS,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "SGD", "params": {"lr": RATE}},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # by itself it clips to 1
        "expert_parallel": {
            "enabled": not off,
            "autoep_size": RANKS,
            "preset_model": "qwen3_moe",
            "use_grouped_mm": False,
        },
    }
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    losses, differences = [], []
    for ids in batches():
        own = ids.chunk(RANKS)[rank]
        loss = engine(input_ids=own, labels=own, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(float(total) / RANKS)
        if rank == 0:
            differences.append(compare(engine, len(losses)))
        torch.distributed.barrier()
    if rank == 0:
        names = sorted({name.split(".", 3)[-1] for name, _ in engine.module.named_parameters() if ".experts." in name})
        plain = train_plainly(STEPS)["losses"]
        print("RESULT", json.dumps({"plain": plain, "auto_ep": losses, "differences": differences, "experts": names}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--as-it-is", action="store_true")
    parser.add_argument("--off", action="store_true")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(arguments.stage, as_it_is=arguments.as_it_is, off=arguments.off)
        return
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611", "WORLD_SIZE": str(RANKS), "DS_ACCELERATOR": "cpu"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__)), *sys.argv[1:]],
            env=os.environ
            | place
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
        )
        for rank in range(RANKS)
    ]
    sys.exit(max(rank.wait() for rank in ranks))


if __name__ == "__main__":
    main()
