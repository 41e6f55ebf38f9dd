"""Names of hardware as people and drivers write them."""

from __future__ import annotations

import pytest

from dstune.core.errors import UserError
from dstune.planning.hardware import DEVICES, known_device, parse


@pytest.mark.parametrize(
    ("text", "count", "device"),
    [
        ("8xH100-80G", 8, "H100-80G"),
        ("8xh100-80gb", 8, "H100-80G"),
        ("H100x8", 8, "H100-80G"),
        ("8x H100 SXM", 8, "H100-80G"),
        ("H200-141G", 1, "H200"),
        ("A100-40GB", 1, "A100-40G"),
        ("4 x A100", 4, "A100-80G"),
        ("2x RTX 4090", 2, "RTX4090"),
        ("4090-24G", 1, "RTX4090"),
        ("RTX-4090", 1, "RTX4090"),
        ("3090", 1, "RTX3090"),
        ("RTX3090", 1, "RTX3090"),
        ("4x3090", 4, "RTX3090"),
        ("RTX 3060 12GB", 1, "RTX3060"),
        ("RTX5090", 1, "RTX5090"),
        ("T4", 1, "T4"),
        ("L4-24GB", 1, "L4"),
        ("L40S-48G", 1, "L40S"),
        ("A10", 1, "A10"),
        ("A6000", 1, "A6000"),
        ("RTX A6000", 1, "A6000"),
        ("RTX 6000 Ada", 1, "RTX6000-ADA"),
        ("B200-192G", 1, "B200"),
        ("4xGB200", 4, "GB200"),
        ("MI300X", 1, "MI300X"),
        ("8xMI325X", 8, "MI325X"),
        ("MI300X-192G", 1, "MI300X"),
        ("V100", 1, "V100-16G"),
    ],
)
def test_usual_spellings(text: str, count: int, device: str) -> None:
    cluster = parse(text, {}, 1)
    assert (cluster.per_node, cluster.device.name, cluster.known) == (count, device, True)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80G"),
        ("NVIDIA H100 PCIe", "H100-80G"),
        ("NVIDIA A100-SXM4-40GB", "A100-40G"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-32GB", "V100-32G"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3080 Ti", None),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX6000-ADA"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Instinct MI325X OAM", "MI325X"),
    ],
)
def test_drivers_names(name: str, device: str | None) -> None:
    """Of another card that is called nearly so, nothing is known."""
    assert known_device(name) is (DEVICES[device] if device else None)


def test_memory_alone_and_what_is_not_known() -> None:
    assert parse("2x24G", {}, 3).device.memory_gib == pytest.approx(23.52)
    assert (parse("2x24G", {}, 3).ranks, parse("80GB", {}, 1).known) == (6, False)
    assert parse("2xCPU", {}, 1).per_node == 2 and known_device("CPU") is None
    assert parse(None, {"memory_gib": 48.0, "tflops": 180.0, "bandwidth": 900.0}, 1).known
    for text, fix in (("H10", "H100"), ("8xRTX4091", "RTX40"), ("0xH100", "8xH100"), ("?", "8xH100")):
        with pytest.raises(UserError) as error:
            parse(text, {}, 1)
        assert fix in error.value.problems[0].fix, text
