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
    """To another node, in GB/s per device and direction."""
    gpu: bool = True
    share_of_peak: float = 0.5
    """Share of `tflops` that large matrix products reach: measured by `dstune plan --calibrate`, otherwise assumed."""
    overhead: float = 0.0
    """Seconds per step and layer that no formula explains (kernel launches, Python); measured if calibrated."""
    capability: tuple[int, int] | None = None
    """CUDA's compute capability, where it is known."""


# Memory in GiB as the driver shows it, a little below the name's figure. Networks: one 400 Gb/s port a GPU for H100 and
# later, 200 Gb/s for A100, 100 Gb/s a node of 8 for cards without a fabric. Cards before Ampere have no bf16: theirs is fp16's.
PCIE_3, PCIE_4, PCIE_5 = 16, 32, 64
"""GB/s of sixteen lanes in one direction."""
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
        # One rank of a CPU with AVX512 or AMX; every real one differs, so calibrate.
        Device("CPU", 8.0, 0.1, 10, 2.0, 1.2, gpu=False, share_of_peak=0.9),
    )
}
DEFAULT_MEMORY = {"A100": "A100-80G", "H100": "H100-80G", "V100": "V100-16G"}
"""A name without its memory."""


def normalize(name: str) -> str:
    """Return a device's name without what spellings differ in: vendor, brand, form factor, spaces, `GB` for `G`.

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
    """Read `8xH100-80G`, `H100x8`, `2x RTX 4090`, `2x24G`: as many devices in each of `nodes` nodes.

    text: None describes one device by `numbers` alone. numbers: by the keys of `NUMBERS`.

    Raises:
        UserError: no such device, or its memory is not given.
    """
    count, name = _split_count(text or "own")
    if count < 1 or not re.fullmatch(r"[\w .-]+", name):
        raise UserError(Problem(key, "this names no hardware", "hardware=8xH100-80G", text or ""))
    device = DEVICES["CPU"] if name.upper() == "CPU" else known_device(name)
    is_known = device is not None or {"tflops", "bandwidth"} <= set(numbers)
    if device is None and (size := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)", name, re.IGNORECASE)):
        # By memory alone: the compute of the slowest card of its time.
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
    """Return (8, `H100`) of `8xH100` and of `H100x8`; `MI300X` and `RTX3090` name one device."""
    if known_device(text) is None:
        if match := re.fullmatch(r"(\d+)\s*[xX*]\s*(\S.*)", text):
            return int(match[1]), match[2].strip()
        if match := re.fullmatch(r"(.*\S)\s*[xX*]\s*(\d{1,3})", text):
            return int(match[2]), match[1].strip()
    return 1, text.strip()


def known_device(name: str) -> Device | None:
    """Return the GPU of the table by any usual spelling of its name, or by the name that its driver gives it.

    Of a name with its memory (`H100-80GB`, `RTX3090-24G`) the table may know the device without it: then its memory is the
    table's, where it agrees to a tenth.
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
