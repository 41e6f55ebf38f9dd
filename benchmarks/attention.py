"""Attention as transformers computes it, with a mask of packed rows, beside samples that attend one by one, on one core.

    python benchmarks/attention.py
    python benchmarks/attention.py --heads 32 --key-heads 8 --size 128 --precision fp32

Each line has two rows of positions that are cut into samples of equal length. Rounds alternate, medians; errors are those of the
three gradients together, beside fp64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as functional

from dstune.models.cpu_attention import CausalAttention
from dstune.trainer.memory import keep_freed

States = tuple[torch.Tensor, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--key-heads", type=int, default=3)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    shape = f"{options.heads} heads of {options.size}, {options.key_heads} of keys"
    print(f"{shape}, {options.precision}, one core, torch {torch.__version__}; transformers / dstune")
    print("| positions | samples of | forward ms | backward ms | x | error |\n| --- | --- | --- | --- | --- | --- |")
    for width, length in ((512, 64), (512, 128), (512, 512), (2048, 512), (2048, 2048)):
        exact = [
            torch.randn(2, width, heads, options.size, dtype=torch.float64)
            for heads in (options.heads, options.key_heads, options.key_heads, options.heads)
        ]
        *states, outward = (part.to(dtype).transpose(1, 2) for part in exact)
        for part in states:
            part.requires_grad_()
        ways = {"transformers": masked(width, length), "dstune": one_by_one(width, length)}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        gradients: dict[str, States] = {}
        for _ in range(options.rounds + 2):
            for name, way in ways.items():
                began = time.perf_counter()
                output = way(*states)
                between = time.perf_counter()
                gradients[name] = torch.autograd.grad(output, states, outward)
                taken[name].append((between - began, time.perf_counter() - between))
        seconds = {name: [statistics.median(part) for part in zip(*taken[name][2:], strict=True)] for name in ways}
        errors = [error(gradients[name], right(states, outward, ways["transformers"])) for name in ways]
        columns = [" / ".join(f"{seconds[name][part] * 1e3:.1f}" for name in ways) for part in (0, 1)]
        faster = sum(seconds["transformers"]) / sum(seconds["dstune"])
        wrong = " / ".join(f"{value:.1e}" for value in errors)
        print(f"| 2 x {width} | {length} | {columns[0]} | {columns[1]} | {faster:.2f} | {wrong} |", flush=True)


def masked(width: int, length: int) -> Callable[..., torch.Tensor]:
    """Attend as transformers calls torch's fused attention: heads of keys repeated, a mask of all positions with all others."""
    sample = torch.arange(width) // length
    mask = ((sample[:, None] == sample) & torch.ones(width, width, dtype=torch.bool).tril()).expand(2, 1, -1, -1)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    return attend


def one_by_one(width: int, length: int) -> Callable[..., torch.Tensor]:
    spans = (tuple((start, start + length) for start in range(0, width, length)),) * 2
    return lambda query, key, value: CausalAttention.apply(query, key, value, spans, query.shape[-1] ** -0.5, None)


def right(states: list[torch.Tensor], outward: torch.Tensor, attend: Callable[..., torch.Tensor]) -> States:
    exact = [part.detach().double().requires_grad_() for part in states]
    return torch.autograd.grad(attend(*exact), exact, outward.double())


def error(gradients: States, expected: States) -> float:
    apart = sum(float((part.double() - exact).square().sum()) for part, exact in zip(gradients, expected, strict=True))
    return (apart / sum(float(exact.square().sum()) for exact in expected)) ** 0.5


if __name__ == "__main__":
    main()
