"""Measure the all-reduce between ranks for `dstune doctor`: each rank runs `python -m dstune.rank.doctor RUN_DIR`.

Each size is first checked by value: ranks send numbers from a formula and know the sum.
Latency is that of a 4 KiB message. Bandwidth is bus bandwidth, bytes / seconds * 2 (n - 1) / n: a ring's traffic over its
slowest link (NVIDIA's nccl-tests, PERFORMANCE.md), which can be compared with the speed of a link.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from dstune.core import environment, rendezvous
from dstune.core.rank_env import RankEnv
from dstune.rank import process
from dstune.zero import accelerator
from dstune.zero.start import start_process_group
from dstune_verify import collectives
from dstune_verify.world import World

SMALL_BYTES = 4096
LARGE_BYTES = {True: (2**24, 2**28, 2**30), False: (2**20, 2**24, 2**26)}
"""Message sizes, by whether ranks are on accelerators."""
MOST_CHECKED_BYTES = 2**26
"""Of a larger message only this much is checked: the expected sum takes several times its memory."""
ROUNDS = {True: 20, False: 5}
"""Timed calls, by whether ranks are on accelerators."""


def measure(device: torch.device, rank: int, size: int) -> dict[str, Any]:
    """Check and measure the all-reduce of the default process group, which has `size` ranks. Every rank must call it."""
    small = torch.zeros(SMALL_BYTES // 4, device=device)
    large_bytes = LARGE_BYTES[device.type != "cpu"]
    world = World(rank, size, 0, device, store=None)
    wrong: list[str] = []
    for size_bytes in (SMALL_BYTES, *large_bytes):
        count = min(size_bytes, MOST_CHECKED_BYTES) // 4 - 1  # odd: the last block is incomplete
        wrong += collectives.differences(f"{count:,} float32", *collectives.all_reduce(world, count, torch.float32))
    latency = _seconds(small, ROUNDS[device.type != "cpu"] * 5)
    rows = []
    for size_bytes in large_bytes:
        seconds = _seconds(torch.zeros(size_bytes // 4, device=device), ROUNDS[device.type != "cpu"])
        bandwidth = size_bytes / seconds * 2 * (size - 1) / size / 1e9 if size > 1 else None
        rows.append({"bytes": size_bytes, "seconds": seconds, "bus_gb_per_second": bandwidth})
    return {"latency_seconds": latency, "sizes": rows, "wrong": wrong}


def _seconds(tensor: torch.Tensor, rounds: int) -> float:
    """Return the mean seconds of one all-reduce, over `rounds` calls after two that set up connections."""
    for number in range(2 + rounds):
        if number == 2:
            _synchronize(tensor)
            began = time.perf_counter()
        torch.distributed.all_reduce(tensor)
    _synchronize(tensor)
    return (time.perf_counter() - began) / rounds


def _synchronize(tensor: torch.Tensor) -> None:
    if not tensor.is_cpu:
        accelerator.synchronize()


def run(directory: Path, env: RankEnv) -> None:
    """Measure in this rank; rank 0 writes the figures into `result.json` of `directory`."""
    rendezvous.meet(env, directory, os.environ)
    if accelerator.present():  # NCCL's log names its transport
        os.environ.setdefault("NCCL_DEBUG", "INFO")
        os.environ.setdefault("NCCL_DEBUG_FILE", str(directory / "logs" / "nccl-%h-%p.log"))
    world = start_process_group(env)
    figures = measure(accelerator.current(), world.rank, world.size)
    hosts = world.gather(environment.host())
    sockets = world.any(_over_sockets(directory))
    wrong_of_ranks = world.gather(figures["wrong"])
    if world.is_main:
        name = accelerator.name()
        figures["wrong"] = [f"rank {rank}: {text}" for rank, texts in enumerate(wrong_of_ranks) for text in texts]
        figures |= {"ranks": world.size, "hosts": sorted(set(hosts)), "device": name, "nccl_over_sockets": sockets}
        (directory / "result.json").write_text(json.dumps({"status": "completed", "allreduce": figures}))
    world.barrier()


def _over_sockets(run_dir: Path) -> bool:
    """Return whether NCCL's logs say that it uses TCP sockets between nodes."""
    return any("via NET/Socket" in log.read_text(errors="replace") for log in (run_dir / "logs").glob("nccl-*.log"))


if __name__ == "__main__":
    process.main(run)
