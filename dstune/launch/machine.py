"""The hardware of this machine as the planner sees it, without torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from dstune.config.schema import RunConfig
from dstune.launch.commands import number_of_ranks, this_machine
from dstune.planning.hardware import ALIASES, DEVICES, GIB, Cluster, Device

NAMES = {
    "A100": "A100-80G",
    "H100": "H100-80G",
    "H200": "H200",
    "B200": "B200",
    "L40S": "L40S",
    "4090": "RTX4090",
    "MI300X": "MI300X",
}
"""What a driver's name contains, and the device of the table whose speed it has."""


@dataclass(frozen=True)
class Here:
    cluster: Cluster
    free_gib: float
    """Memory that one rank may take now."""


def here(config: RunConfig, env: Mapping[str, str] | None = None) -> Here:
    """The ranks that `dstune train` would start here, and what each of them has.

    Raises UserError for more processes than GPUs.
    """
    machine = this_machine(os.environ if env is None else env)
    ranks = number_of_ranks(config, machine)
    memory = psutil.virtual_memory()
    if machine.gpus and (listed := gpus()):
        name, total, free = min(listed, key=lambda gpu: gpu[2])
        found = next((DEVICES[key] for part, key in NAMES.items() if part in name.upper()), None)
        device = replace(found or Device(name, total, 100, 1000, 32, 12.5), memory_gib=total)
        return Here(Cluster(device, ranks, known=found is not None, host_gib=memory.available / GIB), free)
    available = min(memory.available, container_limit()) / GIB
    cpu = replace(DEVICES["CPU"], memory_gib=available / ranks)
    return Here(Cluster(cpu, ranks, known=False), available / ranks)


def gpus() -> list[tuple[str, float, float]]:
    """Name, total and free memory in GiB of each GPU that the driver's tool lists; none where there is no such tool."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        rows = [line.rsplit(",", 2) for line in lines if line.strip()]
        return [(name.strip(), float(total) / 1024, float(free) / 1024) for name, total, free in rows]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def container_limit(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that this process's container may still take; infinite without a limit."""
    try:
        limit = (root / "memory.max").read_text().strip()
        if limit == "max":
            return float("inf")
        return max(0.0, int(limit) - int((root / "memory.current").read_text()))
    except (OSError, ValueError):
        return float("inf")


def fast_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies bf16 matrices at least as fast as fp32 ones (`dstune.zero.precision.fast_bf16`)."""
    try:
        flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


assert set(NAMES.values()) <= set(DEVICES) and set(ALIASES.values()) <= set(DEVICES)
