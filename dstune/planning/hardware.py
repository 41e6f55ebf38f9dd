"""What devices can do, as data, and `hardware=8xH100-80G nodes=4` read into it.

Peaks are the vendors' published dense bf16 figures (no sparsity), memory bandwidth and links theirs too; the address of
each data sheet's name stands in docs/planning.md. Prices are not data: `price=` is the user's own.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Any

from dstune.core.errors import Problem, UserError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator, or one rank's share of a CPU."""

    name: str
    memory_gib: float
    """Usable memory."""
    tflops: float
    """Peak of dense bf16 matrix products, in 10^12 floating-point operations a second."""
    bandwidth: float
    """Memory bandwidth in GB/s."""
    link: float
    """To another device of the same node, GB/s in one direction."""
    network: float
    """To another node, GB/s for each device in one direction."""
    gpu: bool = True
    share_of_peak: float = 0.5
    """Share of `tflops` that large matrix products reach; measured by `dstune plan --calibrate`, assumed otherwise."""
    overhead: float = 0.0
    """Seconds of a step and layer that no formula explains (kernel launches, Python); measured where calibrated."""
    capability: tuple[int, int] | None = None
    """CUDA's compute capability, where it is known."""


# Memory in GiB as the driver shows it, a little below the name's figure. Networks: one 400 Gb/s port a GPU for H100 and
# later, 200 Gb/s for A100, 100 Gb/s a node of 8 for cards without a fabric.
DEVICES = {
    device.name: device
    for device in (
        Device("A100-40G", 39.4, 312, 1555, 300, 25),
        Device("A100-80G", 79.2, 312, 2039, 300, 25),
        Device("H100-80G", 79.2, 989, 3350, 450, 50),
        Device("H200", 139.8, 989, 4800, 450, 50),
        Device("B200", 178.0, 2250, 8000, 900, 50),
        Device("L40S", 44.4, 362, 864, 32, 12.5),
        Device("RTX4090", 23.5, 165, 1008, 32, 1.5),
        Device("MI300X", 191.5, 1307, 5300, 448, 50),
        # One rank of a CPU with AVX512 or AMX; every real one differs, so calibrate.
        Device("CPU", 8.0, 0.1, 10, 2.0, 1.2, gpu=False, share_of_peak=0.9),
    )
}
ALIASES = {
    "A100": "A100-80G",
    "H100": "H100-80G",
    "H200-141G": "H200",
    "B200-192G": "B200",
    "B200-180G": "B200",
    "L40S-48G": "L40S",
    "4090": "RTX4090",
    "RTX-4090": "RTX4090",
    "4090-24G": "RTX4090",
    "MI300X-192G": "MI300X",
}
DRIVER_NAMES = {
    "A100": "A100-80G",
    "H100": "H100-80G",
    "H200": "H200",
    "B200": "B200",
    "L40S": "L40S",
    "4090": "RTX4090",
    "MI300X": "MI300X",
}
"""What a driver's name contains, and the device of the table whose speed it has."""
NUMBERS = {
    "memory_gib": "memory of a device in GiB",
    "tflops": "peak of bf16 matrix products in TFLOP/s",
    "bandwidth": "memory bandwidth in GB/s",
    "link": "GB/s to another device of the node",
    "network": "GB/s to another node for each device",
    "host_gib": "memory of a node in GiB, for what is offloaded",
}
"""Keys of `hardware.KEY=VALUE`, which replace single numbers or describe hardware of one's own."""


@dataclass(frozen=True)
class Cluster:
    device: Device
    per_node: int
    nodes: int = 1
    known: bool = True
    """Whether compute and links are known, not memory alone."""
    host_gib: float | None = None
    """Memory of a node for what is offloaded; None where it is not known."""

    @property
    def ranks(self) -> int:
        return self.per_node * self.nodes

    @property
    def link(self) -> float:
        """GB/s of the slowest step of a ring over all ranks."""
        if self.nodes == 1:
            return self.device.link
        return min(self.device.link, self.device.network * self.per_node) if self.per_node > 1 else self.device.network


def parse(text: str | None, numbers: dict[str, float], nodes: int, key: str = "hardware") -> Cluster:
    """`8xH100-80G`, `H100`, `2x24G`: as many devices in each of `nodes` nodes.

    text: None describes one device by `numbers` alone. numbers: by the keys of `NUMBERS`.

    Raises:
        UserError: no such device, or its memory is not given.
    """
    match = re.fullmatch(r"(?:(\d+)\s*[xX])?\s*([\w.-]+)", text or "own")
    if match is None or (match[1] and int(match[1]) < 1):
        raise UserError(Problem(key, "this names no hardware", "hardware=8xH100-80G", text or ""))
    count, name = int(match[1] or 1), match[2]
    device = _find(name)
    if device is None and (size := re.fullmatch(r"(\d+(?:\.\d+)?)(?:G|GB|GiB)", name)):
        # By memory alone: the compute of the slowest card of its time.
        numbers = {"memory_gib": float(size[1]) * 0.98} | numbers
    if device is None:
        if "memory_gib" not in numbers:
            near = difflib.get_close_matches(name.upper(), [*DEVICES, *ALIASES], n=1)
            fix = f"did you mean {near[0]}?" if near else f"known are {', '.join(DEVICES)}"
            more = "; or describe it: hardware.memory_gib=48 hardware.tflops=180 hardware.bandwidth=900"
            raise UserError(Problem(key, "this hardware is not in the table", fix + more, text or ""))
        device = Device(name, numbers["memory_gib"], 100, 1000, 32, 12.5)
    known = name.upper() in (*DEVICES, *ALIASES) or {"tflops", "bandwidth"} <= set(numbers)
    own: dict[str, Any] = {number: value for number, value in numbers.items() if number != "host_gib"}
    return Cluster(replace(device, **own), count, nodes, known, numbers.get("host_gib"))


def known_device(name: str) -> Device | None:
    """The device of the table by the name that its driver gives it."""
    return next((DEVICES[key] for part, key in DRIVER_NAMES.items() if part in name.upper()), None)


def _find(name: str) -> Device | None:
    upper = name.upper()
    return DEVICES.get(ALIASES.get(upper, upper))


assert {*ALIASES.values(), *DRIVER_NAMES.values()} <= set(DEVICES)
