"""The performance of devices as a table, and the parser of `hardware=8xH100-80G nodes=4`.

Peaks are the vendors' published dense bf16 figures (no sparsity); memory bandwidths and links are the vendors' figures too.
docs/planning.md lists the data sheets. The table has no prices: users give theirs with `price=`.
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
    """Bandwidth to another device of the same node, in GB/s and one direction."""
    network: float
    """Bandwidth to another node, in GB/s per device and direction."""
    gpu: bool = True
    share_of_peak: float = 0.5
    """Share of `tflops` that large matrix products reach: measured by `dstune plan --calibrate`, otherwise assumed."""
    overhead: float = 0.0
    """Seconds per step and layer that no formula explains (kernel launches, Python); measured if calibrated."""
    capability: tuple[int, int] | None = None
    """CUDA's compute capability; None if it is not known."""


# Memory is in GiB as the driver shows it, a little less than the figure in the name. Networks: one port of 400 Gb/s per GPU for
# H100 and later, 200 Gb/s for A100, and 100 Gb/s per node of 8 for cards without a fabric. Cards before Ampere have no bf16: the
# table has their fp16 peak.
PCIE_3, PCIE_4, PCIE_5 = 16, 32, 64
"""GB/s of sixteen PCIe lanes in one direction."""
DEVICES = {
    device.name: device
    for device in (
        Device("A100-40G", 39.4, 312, 1555, 300, 25),
        Device("A100-80G", 79.2, 312, 2039, 300, 25),
        Device("H100-80G", 79.2, 989, 3350, 450, 50),
        Device("H200", 139.8, 989, 4800, 450, 50),
        Device("B200", 178.0, 2250, 8000, 900, 50),
        Device("GB200", 184.0, 2500, 8000, 900, 50),
        Device("MI300X", 191.5, 1307, 5300, 448, 50),
        Device("MI325X", 255.5, 1307, 6000, 448, 50),
        Device("L40S", 44.4, 362, 864, PCIE_4, 12.5),
        Device("L40", 44.4, 181, 864, PCIE_4, 12.5),
        Device("L4", 22.0, 121, 300, PCIE_4, 1.5),
        Device("A40", 44.4, 149.7, 696, PCIE_4, 1.5),
        Device("A10", 22.0, 125, 600, PCIE_4, 1.5),
        Device("T4", 14.6, 65, 320, PCIE_3, 1.5, capability=(7, 5)),
        Device("V100-16G", 15.7, 125, 900, 150, 12.5, capability=(7, 0)),
        Device("V100-32G", 31.7, 125, 900, 150, 12.5, capability=(7, 0)),
        Device("A6000", 47.4, 154.8, 768, PCIE_4, 1.5),
        Device("RTX6000-ADA", 47.4, 364, 960, PCIE_4, 1.5),
        Device("RTX3060", 11.7, 25.6, 360, PCIE_4, 1.5),
        Device("RTX3070", 7.7, 40.6, 448, PCIE_4, 1.5),
        Device("RTX3080", 9.7, 59.5, 760, PCIE_4, 1.5),
        Device("RTX3090", 23.5, 71, 936, PCIE_4, 1.5),
        Device("RTX4060", 7.7, 30.2, 272, PCIE_4, 1.5),
        Device("RTX4070", 11.7, 58.3, 504, PCIE_4, 1.5),
        Device("RTX4080", 15.6, 97.5, 717, PCIE_4, 1.5),
        Device("RTX4090", 23.5, 165, 1008, PCIE_4, 1.5),
        Device("RTX5070", 11.5, 61.7, 672, PCIE_5, 1.5),
        Device("RTX5080", 15.5, 112.6, 960, PCIE_5, 1.5),
        Device("RTX5090", 31.4, 209.5, 1792, PCIE_5, 1.5),
        # One rank on a CPU with AVX512 or AMX. Real CPUs differ a lot, so calibrate.
        Device("CPU", 8.0, 0.1, 10, 2.0, 1.2, gpu=False, share_of_peak=0.9),
    )
}
DEFAULT_MEMORY = {"A100": "A100-80G", "H100": "H100-80G", "V100": "V100-16G"}
"""The device that a name without a memory size stands for."""


def normalize(name: str) -> str:
    """Return a device's name in a form that all its usual spellings share, without vendor, brand, form factor and spaces, and with
    `G` for `GB`.

    `NVIDIA H100 80GB HBM3`, `h100-80gb` and `H100-SXM5-80G` are `H10080G`, `GeForce RTX 4090` and `4090-24G` are `4090`.
    """
    upper = re.sub(
        r"NVIDIA|GEFORCE|AMD|INSTINCT|TESLA|QUADRO|GENERATION|HBM\w*|SXM\d*|PCIE|\bOAM\b|\bNVL\b", " ", name.upper()
    )
    word = re.sub(r"[\s_-]+", "", re.sub(r"(\d)\s*(?:GIB|GB)\b", r"\1G", upper))
    return re.sub(r"^RTX(?=\d{4}|A\d{4})|\bRTX(?=A\d{4})", "", word)


_BY_NORMALIZED = {normalize(name): name for name, device in DEVICES.items() if device.gpu} | DEFAULT_MEMORY
NUMBERS = {
    "memory_gib": "memory of a device in GiB",
    "tflops": "peak of bf16 matrix products in TFLOP/s",
    "bandwidth": "memory bandwidth in GB/s",
    "link": "GB/s to another device of the node",
    "network": "GB/s to another node for each device",
    "host_gib": "memory of a node in GiB, for what is offloaded",
}
"""Keys of `hardware.KEY=VALUE`, which replace numbers of the table or describe hardware that is not in it."""


@dataclass(frozen=True)
class Cluster:
    device: Device
    per_node: int
    nodes: int = 1
    known: bool = True
    """Whether compute and links are known, too; if not, only the memory is."""
    host_gib: float | None = None
    """GiB of a node's host memory, which offloading uses; None if it is not known."""

    @property
    def ranks(self) -> int:
        return self.per_node * self.nodes

    @property
    def link(self) -> float:
        """GB/s of the slowest link of a ring over all ranks."""
        if self.nodes == 1:
            return self.device.link
        return min(self.device.link, self.device.network * self.per_node) if self.per_node > 1 else self.device.network


def parse(text: str | None, numbers: dict[str, float], nodes: int, key: str = "hardware") -> Cluster:
    """Parse `8xH100-80G`, `H100x8`, `2x RTX 4090` or `2x24G` into a cluster with that many devices in each of `nodes` nodes.

    text: if None, `numbers` alone describe one device. numbers: values by the keys of `NUMBERS`, which take precedence over the
    table. key: the key that problems name.

    Raises:
        UserError: `text` names no hardware, or the device is not in the table and its memory is not given.
    """
    count, name = _split_count(text or "own")
    if count < 1 or not re.fullmatch(r"[\w .-]+", name):
        raise UserError(Problem(key, "this names no hardware", "hardware=8xH100-80G", text or ""))
    device = DEVICES["CPU"] if name.upper() == "CPU" else known_device(name)
    is_known = device is not None or {"tflops", "bandwidth"} <= set(numbers)
    if device is None and (size := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)", name, re.IGNORECASE)):
        # Only the memory is given; the compute below is that of the slowest card of its time.
        numbers = {"memory_gib": float(size[1]) * 0.98} | numbers
    if device is None:
        if "memory_gib" not in numbers:
            near = difflib.get_close_matches(normalize(name), list(_BY_NORMALIZED), n=1)
            fix = f"did you mean {_BY_NORMALIZED[near[0]]}?" if near else f"known are {', '.join(DEVICES)}"
            description = "; or describe it: hardware.memory_gib=48 hardware.tflops=180 hardware.bandwidth=900"
            raise UserError(Problem(key, "this hardware is not in the table", fix + description, text or ""))
        device = Device(name, numbers["memory_gib"], 100, 1000, PCIE_4, 12.5)
    replaced: dict[str, Any] = {number: value for number, value in numbers.items() if number != "host_gib"}
    return Cluster(replace(device, **replaced), count, nodes, is_known, numbers.get("host_gib"))


def _split_count(text: str) -> tuple[int, str]:
    """Split `8xH100` or `H100x8` into (8, `H100`). `MI300X` and `RTX3090` name one device."""
    if known_device(text) is None:
        if match := re.fullmatch(r"(\d+)\s*[xX*]\s*(\S.*)", text):
            return int(match[1]), match[2].strip()
        if match := re.fullmatch(r"(.*\S)\s*[xX*]\s*(\d{1,3})", text):
            return int(match[2]), match[1].strip()
    return 1, text.strip()


def known_device(name: str) -> Device | None:
    """Return the table's GPU for any usual spelling of its name, or for the name that its driver reports; None if there is none.

    A name with a memory size (`H100-80GB`, `RTX3090-24G`) also matches a table entry without one, if the entry's memory differs
    from that size by less than 10%. The device then has the memory of the table.
    """
    word = normalize(name)
    if key := _BY_NORMALIZED.get(word):
        return DEVICES[key]
    for digits in (1, 2, 3):  # `L424G` is an L4 with 24 GB
        sized = re.fullmatch(rf"(.+?)(\d{{{digits}}})G", word)
        if sized and (key := _BY_NORMALIZED.get(sized[1])):
            device = DEVICES[key]
            if abs(device.memory_gib / float(sized[2]) - 1) < 0.1:
                return device
    return None
