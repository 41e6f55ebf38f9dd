"""The hardware of this machine as the planner sees it, without torch."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dstune.config.schema import RunConfig
from dstune.launch.commands import number_of_ranks, this_machine
from dstune.planning.hardware import DEVICES, GIB, Cluster, Device, known_device
from dstune.planning.host import available_bytes


@dataclass(frozen=True)
class Gpu:
    name: str
    uuid: str
    memory_gib: float
    free_gib: float
    capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class Here:
    cluster: Cluster
    free_gib: float
    """Memory that one rank may take now; infinite where there are GPUs of which nothing is known."""


def here(config: RunConfig, env: Mapping[str, str] | None = None, ranks: int | None = None) -> Here:
    """Return the ranks that `dstune train` would start here, and the device of each.

    ranks: how many there are, where another launcher has started them. Raises UserError for more processes than GPUs.
    """
    env = os.environ if env is None else env
    machine = this_machine(env)
    ranks = ranks or number_of_ranks(config, machine)
    if machine.gpus and (listed := gpus()):
        used_gpus = used(listed, env, ranks)
        fullest = min(used_gpus or listed, key=lambda gpu: gpu.free_gib)
        free = fullest.free_gib if used_gpus else float("inf")
        name, total = fullest.name, fullest.memory_gib
        published = known_device(name)
        device = replace(published or Device(name, total, 100, 1000, 32, 12.5), memory_gib=total)
        # Rank 0 decides the precision of all ranks.
        device = replace(device, capability=(used_gpus or [fullest])[0].capability)
        return Here(Cluster(device, ranks, known=published is not None, host_gib=available_bytes() / GIB), free)
    available = available_bytes() / GIB
    cpu = replace(DEVICES["CPU"], memory_gib=available / ranks)
    return Here(Cluster(cpu, ranks, known=False), float("inf") if machine.gpus else available / ranks)


def used(listed: list[Gpu], env: Mapping[str, str], ranks: int) -> list[Gpu]:
    """Return those of all GPUs that `ranks` ranks take: the driver's tool lists the hidden ones too, which others may fill.

    Empty where that is not certain: CUDA_VISIBLE_DEVICES names parts of GPUs, or CUDA counts them in another order.
    """
    visible = env.get("CUDA_VISIBLE_DEVICES")
    names = list(map(str, range(len(listed)))) if visible is None else [name.strip() for name in visible.split(",")]
    # CUDA puts the fastest first, the driver's tool goes by the slot.
    numbered = len({gpu.name for gpu in listed}) == 1 or env.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    gpus = []
    for name in names[:ranks]:
        matching = [
            gpu
            for number, gpu in enumerate(listed)
            if (numbered and name == str(number)) or (name.startswith("GPU-") and gpu.uuid.startswith(name))
        ]
        if len(matching) != 1:
            return []
        gpus += matching
    return gpus


def gpus() -> list[Gpu]:
    """Return each GPU that the driver's tool lists, by its number; none where there is no such tool."""
    keys = "name,uuid,memory.total,memory.free"
    return _gpus(f"{keys},compute_cap") or _gpus(keys)  # drivers before 510 refuse the whole query for the last one


def _gpus(keys: str) -> list[Gpu]:
    query = ["nvidia-smi", f"--query-gpu={keys}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        rows = [[part.strip() for part in line.rsplit(",", keys.count(","))] for line in lines if line.strip()]
        return [
            Gpu(name, uuid, float(total) / 1024, float(free) / 1024, _capability(*further))
            for name, uuid, total, free, *further in rows
        ]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def _capability(text: str = "") -> tuple[int, int] | None:
    """Return `7.5`, as the driver's tool has it."""
    match = re.fullmatch(r"(\d+)\.(\d+)", text)
    return None if match is None else (int(match[1]), int(match[2]))
