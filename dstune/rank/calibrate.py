"""Measure a rank's speeds for `dstune plan --calibrate`: each rank runs `python -m dstune.rank.calibrate DIR`.

All ranks measure at the same time, as they train: they share memory bandwidth, and on a CPU its caches.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as torch_dist
import torch.nn.functional as functional

from dstune.config.compose import compose
from dstune.config.schema import Precision
from dstune.core.distributed import World
from dstune.core.rank_env import RankEnv
from dstune.models.attention import SamplesApart
from dstune.models.cpu_attention import CausalAttention
from dstune.models.cross_entropy import projected_cross_entropy
from dstune.models.norms import use_lean_norms
from dstune.planning import activations
from dstune.planning.architecture import architecture
from dstune.planning.flops import forward_flops
from dstune.planning.setup import Setup, setup
from dstune.planning.time import Speed
from dstune.rank import process
from dstune.zero import accelerator
from dstune.zero.precision import fast_bf16
from dstune.zero.start import start_process_group

SECONDS = 1.0
"""Time spent on each measurement, after one untimed call."""

SMALL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
"""The decoder whose layers are timed, forward and backward."""

LENGTH = 512
"""Tokens a row."""


def calibrate(directory: Path, world: World) -> None:
    """Measure, and write `speeds.json` into `directory` on rank 0: a `Speed` for each number of bytes a weight."""
    device = accelerator.current()
    formats = {4: torch.float32} | ({2: torch.bfloat16} if fast_bf16() else {})
    link = communication(world, device)
    speeds = {size: asdict(compute(world, device, size, dtype, link)) for size, dtype in formats.items()}
    if world.is_main:
        device_name = accelerator.name()
        figures = {"device": device_name, "ranks": world.size, "threads": torch.get_num_threads(), "speeds": speeds}
        (directory / "speeds.json").write_text(json.dumps(figures, indent=1))
    world.barrier()


def compute(world: World, device: torch.device, size: int, dtype: torch.dtype, link: float) -> Speed:
    """Measure the speeds of one number format, whose weights have `size` bytes."""
    on_gpu = device.type != "cpu"
    width = 4096 if on_gpu else 1024
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    flops = 2 * width**3 / seconds_of(world, device, lambda: a @ b)
    attention = attention_flops() / seconds_of(world, device, attention_pass(device, dtype))

    weight = torch.nn.Parameter(torch.randn(1 << 23, device=device))
    weight.grad = torch.randn_like(weight)
    adam = torch.optim.AdamW([weight], fused=True)
    weights = weight.numel() / seconds_of(world, device, adam.step)
    speed = Speed(
        flops=flops,
        saved=float("inf"),
        logits=logit_rate(world, device, dtype, flops),
        weights=weights,
        link=link,
        attention=attention,
    )
    return layers(world, device, dtype, size, speed)


def logit_rate(world: World, device: torch.device, dtype: torch.dtype, flops: float) -> float:
    """Measure how many logits a second training's cross entropy computes, without its matrix products."""
    targets, vocabulary, width = 512, 32768, 64
    projection = torch.nn.Linear(width, vocabulary, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(targets, width, device=device, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocabulary, (targets,), device=device)

    def loss_pass() -> None:
        hidden.grad = projection.weight.grad = None
        projected_cross_entropy(projection, projection.forward, hidden, labels).loss_sum.backward()

    seconds = seconds_of(world, device, loss_pass)
    products = 3 * 2 * targets * vocabulary * width / flops
    return targets * vocabulary / max(seconds - products, seconds / 20)


def small_setup(size: int, rows: int, *, on_gpu: bool) -> Setup:
    """Describe to the planner how the layers of `SMALL` are timed: weights of `size` bytes, `rows` rows of `LENGTH` tokens."""
    config = compose(
        [
            "task=causal_lm",
            "data=files",
            f"data.max_length={LENGTH}",
            "data.packing=true",
            f"trainer.micro_batch_size={rows}",
            f"trainer.global_batch_size={rows}",
        ],
        keep_plugins=True,
    ).config
    precision = Precision.bf16 if size == 2 else Precision.fp32
    return setup(config, architecture(SMALL), ranks=1, ranks_per_node=1, on_gpu=on_gpu, precision=precision, values={})


def layers(world: World, device: torch.device, dtype: torch.dtype, size: int, speed: Speed) -> Speed:
    """Measure the rate of elementwise work: bytes that a decoder's layers save, by their seconds beside matrix products."""
    from transformers import AutoConfig, AutoModelForCausalLM

    on_gpu = device.type != "cpu"
    rows = 8 if on_gpu else 2
    values = {key: value for key, value in SMALL.items() if key != "model_type"}
    config = AutoConfig.for_model("llama", **values)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    use_lean_norms(model)
    tokens = torch.randint(512, (rows, LENGTH), device=device)
    inputs = {"input_ids": tokens, "position_ids": torch.arange(LENGTH, device=device).expand(rows, -1)}
    if on_gpu:
        inputs["position_ids"] = inputs["position_ids"] % (LENGTH // 2)
    else:
        inputs, _ = SamplesApart(model).model_inputs(inputs, tokens)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        hidden.float().sum().backward()

    seconds = seconds_of(world, device, step)
    planned = small_setup(size, rows, on_gpu=on_gpu)
    linear, attention, _ = forward_flops(planned)
    products = 3 * linear / speed.flops + 3 * attention / speed.attention
    saved_bytes = planned.model.layers * activations.layer(planned).saved
    elementwise_seconds = max(seconds - products, seconds / 20)
    return Speed(**(asdict(speed) | {"saved": saved_bytes / elementwise_seconds}))


HEADS, HEAD = 12, 64
"""Number of attention heads, and their size."""


def attention_flops() -> float:
    """Return the operations of `attention_pass` as the planner counts them: three times those of the forward pass."""
    return 3.0 * 4 * HEADS * HEAD * LENGTH * LENGTH * 2


def attention_pass(device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that runs causal attention forward and backward, over two rows."""
    query, key, value = (
        torch.randn(2, HEADS, LENGTH, HEAD, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    mask = torch.ones(2, 1, LENGTH, LENGTH, device=device, dtype=torch.bool).tril()
    spans = (((0, LENGTH),),) * 2

    def run() -> None:
        if device.type == "cpu":
            output = CausalAttention.apply(query, key, value, spans, HEAD**-0.5, None)
        else:
            output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        output.float().sum().backward()

    return run


def communication(world: World, device: torch.device) -> float:
    """Measure the bytes a second that a rank sends in an all-reduce of 32 MiB; 1e12 for a single rank."""
    if world.size == 1:
        return 1e12
    buffer = torch.zeros(1 << 23, device=device)
    seconds = seconds_of(world, device, lambda: torch_dist.all_reduce(buffer), equally_often=True)
    return 2 * (world.size - 1) / world.size * buffer.numel() * 4 / seconds


def seconds_of(
    world: World, device: torch.device, action: Callable[[], object], *, equally_often: bool = False
) -> float:
    """Measure the seconds of one call of `action`, the mean over all ranks. equally_often: it is a collective, so all ranks call it
    exactly 5 times."""

    def call() -> None:
        action()
        if device.type != "cpu":
            accelerator.synchronize()

    call()
    world.barrier()
    began, calls = time.perf_counter(), 0
    while calls < 5 if equally_often else (calls < 3 or time.perf_counter() - began < SECONDS):
        call()
        calls += 1
    return float(world.gather_numbers([(time.perf_counter() - began) / calls]).mean())


def run(directory: Path, env: RankEnv) -> None:
    """Calibrate in this rank; rank 0 writes `result.json` into `directory` in the end."""
    world = start_process_group(env)
    calibrate(directory, world)
    if world.is_main:
        (directory / "result.json").write_text(json.dumps({"status": "completed"}))
    world.barrier()


if __name__ == "__main__":
    process.main(run)
