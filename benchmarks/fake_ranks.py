"""What one of hundreds of ranks keeps and sends at ZeRO-3, counted beside `dstune plan`, without the other ranks.

    python benchmarks/fake_ranks.py                                        # Llama 3 8B on 512 ranks: about three minutes
    python benchmarks/fake_ranks.py --model llama3_70b --ranks 512         # about 16 GiB

Rank 0 builds dstune's engine with some blocks of the model's real sizes (random weights), and with one more, and makes two steps
with each. The process group is torch's fake one: its collectives send nothing, and this program counts their bytes as a rank sends
them by ring algorithms. What one more block adds is what each further block of the whole model takes. There are so many blocks that
DeepSpeed, which keeps up to a billion gathered weights for the backward pass, has to release some of them, as with the whole model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

PER_NODE = 8
LENGTH = 16
RING = {
    "_allgather_base_": 1,
    "allgather_": 1,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_": 1,
    "allreduce_": 2,
    "broadcast_": 1,
}
"""How often a rank sends each byte of a collective, times (ranks - 1) / ranks."""


def overrides(model: str, ranks: int) -> list[str]:
    return [
        f"model={model}",
        "data=chitchat",
        f"data.max_length={LENGTH}",
        "zero=stage3",
        "trainer.precision=bf16",
        "trainer.micro_batch_size=1",
        f"trainer.global_batch_size={ranks}",
    ]


def bytes_of(value: Any) -> int:
    import torch

    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(bytes_of, value)) if isinstance(value, (list, tuple)) else 0


def count(model: str, ranks: int, layers: int) -> dict[str, Any]:
    """Build the engine in this process, make two steps, and return what it keeps and what the second step sent."""
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch.utils._python_dispatch import TorchDispatchMode

    os.environ |= {"RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(PER_NODE)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)

    from dstune.zero.start import import_deepspeed

    import_deepspeed()
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from dstune.config.compose import compose
    from dstune.core.distributed import World
    from dstune.optim.groups import method_groups
    from dstune.protocols import method_of, optimizer_of
    from dstune.zero.ds_config import deepspeed_config
    from dstune.zero.engine import Engine
    from dstune.zero.precision import Precision
    from dstune.zero.restore import partitions_of

    deepspeed.init_distributed("fake", auto_mpi_discovery=False)
    calls: Counter[str] = Counter()
    sent: Counter[str] = Counter()

    class Collectives(TorchDispatchMode):
        """Counts collectives, and fills what they would have received, so that losses are finite."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.namespace == "c10d":
                name = func._schema.name.split("::")[1]
                calls[name] += 1
                sent[name] += int(RING.get(name, 0) * max(map(bytes_of, args)) * (ranks - 1) / ranks)
                if name == "_allgather_base_":
                    args[0].view(ranks, -1).copy_(args[1].reshape(1, -1).clone())
            return result

    config = compose(overrides(model, ranks)).config
    settings = deepspeed_config(config, ranks, Precision.bf16, on_gpu=True)
    world = World.__new__(World)  # its constructor exchanges proofs between ranks
    vars(world).update(
        rank=0, size=ranks, local_rank=0, local_size=PER_NODE, data_parallel_rank=0, data_parallel_size=ranks
    )
    vars(world).update(env=None, place_in_group=0, counts=True, _control=torch.distributed.group.WORLD)
    published = AutoConfig.for_model(**architecture(model) | {"num_hidden_layers": layers})
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=settings, dtype=torch.bfloat16):
        loaded = AutoModelForCausalLM.from_config(published, dtype=torch.bfloat16)
    for parameter in loaded.parameters():  # this rank's part alone: to draw whole weights would take minutes
        parameter.ds_tensor.normal_(std=0.02)
    module = method_of(config.method).apply(loaded, config)
    engine = Engine(
        module, optimizer_of(config.optimizer), settings, world, groups=method_groups(config, module), one_pass=True
    )
    tokens = torch.randint(0, published.vocab_size, (1, LENGTH))

    class Output:
        def __init__(self, logits: torch.Tensor):
            self.loss_sum = torch.nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="sum")

    def loss(forward: Any, batch: Any) -> Output:
        return Output(forward(**batch, use_cache=False).logits)

    for _ in range(2):
        calls.clear()
        sent.clear()
        with Collectives():
            engine.accumulate(loss, {"input_ids": tokens}, batch_weight=float(ranks * LENGTH), last=True)
            update = engine.update()
    assert update.applied, update
    inner = engine._engine.optimizer
    partitions = partitions_of(engine._engine, 3, 0)
    states = [value for each in partitions for value in inner.optimizer.state[each.key].values()]
    kept = {
        "weights": sum(bytes_of(parameter.ds_tensor) for parameter in module.parameters()),
        "optimizer": sum(bytes_of(each.key) for each in partitions) + sum(map(bytes_of, states)),
    }
    return {"calls": calls, "sent": sent, "kept": kept}


def architecture(model: str) -> dict[str, Any]:
    """Return the values of the model's config.json, as published."""
    from dstune.config.compose import compose
    from dstune.planning.published import CONFIGS

    return dict(CONFIGS[compose(overrides(model, PER_NODE)).config.model.path])


def blocks_of(model: str) -> int:
    """Return how many blocks have more weights than DeepSpeed keeps gathered and looks ahead, together."""
    values = architecture(model)
    hidden, heads, groups = (values[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    block = 3 * hidden * values["intermediate_size"] + 2 * hidden * hidden * (1 + groups / heads)
    return 1 + int(2e9 // block)


def whole(fewer: dict[str, int], more: dict[str, int], further: int) -> dict[str, int]:
    """Return the values of a model with `further` more blocks than the one of `fewer`, of which `more` has one more."""
    return {name: fewer.get(name, 0) + further * (more[name] - fewer.get(name, 0)) for name in more}


def planned(model: str, ranks: int) -> tuple[dict[str, int], int, int]:
    """Return the planned bytes of a rank by part, those that it sends in a step, and the number of layers."""
    from dstune.config.compose import compose
    from dstune.planning.hardware import DEVICES, Cluster
    from dstune.planning.memory import memory
    from dstune.planning.stage import setup_on
    from dstune.planning.time import communication

    cluster = Cluster(DEVICES["H100-80G"], PER_NODE, ranks // PER_NODE)
    setup, _, _ = setup_on(compose(overrides(model, ranks)).config, cluster, None)
    return memory(setup).moments["step"], communication(setup), setup.model.layers


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3_8b")
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(None if argv is None else list(argv))
    if options.layers:
        warnings.simplefilter("ignore")
        print("COUNTED " + json.dumps(count(options.model, options.ranks, options.layers)))
        return
    counted = []
    blocks = blocks_of(options.model)
    for layers in (blocks, blocks + 1):
        words = [
            sys.executable,
            __file__,
            "--model",
            options.model,
            "--ranks",
            str(options.ranks),
            "--layers",
            str(layers),
        ]
        done = subprocess.run(
            words, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"}
        )
        counted.append(json.loads(done.stdout.rsplit("COUNTED ", 1)[1]))
    parts, communication, layers_of_model = planned(options.model, options.ranks)
    kept, sent, calls = (
        whole(*(each[name] for each in counted), layers_of_model - blocks) for name in ("kept", "sent", "calls")
    )
    print(f"{options.model} on {options.ranks} ranks, torch {version('torch')}, deepspeed {version('deepspeed')}")
    print("| of a rank | counted | planned |\n|---|---:|---:|")
    for name, value in kept.items():
        print(f"| {name}, MiB | {value / 2**20:,.1f} | {parts.get(name, 0) / 2**20:,.1f} |")
    print(f"| sent in a step, GiB | {sum(sent.values()) / 2**30:,.2f} | {communication / 2**30:,.2f} |")
    for name, value in sent.items():
        print(f"| `{name}` | {value / 2**30:,.2f} GiB, {calls[name]:,} calls | |")


if __name__ == "__main__":
    main()
