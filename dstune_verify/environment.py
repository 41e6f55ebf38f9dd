"""What is installed, and on what it runs. Nothing private: no host names, users, paths or addresses."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections import Counter
from typing import Any

import torch

from dstune_verify.world import World, device_type

JUDGED = (
    "torch", "deepspeed", "transformers", "accelerate", "peft", "trl", "liger-kernel", "flash-attn", "triton", "xformers",
    "bitsandbytes", "unsloth", "axolotl", "ms-swift", "torchtune", "numpy",
)  # fmt: skip
"""The packages that are written into certificates and tables, if they are installed."""


def version_of(package: str) -> str:
    """Return the version of the package that an import would take; empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def packages() -> dict[str, str]:
    """Return the versions of the judged packages that are installed."""
    return {name: version for name in JUDGED if (version := version_of(name))}


def all_packages() -> dict[str, str]:
    """Return the version of every installed package; the first on the module path counts, as for imports."""
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        versions.setdefault(name, distribution.version)
    return versions


def digest(versions: dict[str, str]) -> str:
    """Return a short digest of packages and versions."""
    lines = "\n".join(f"{name}=={version}" for name, version in sorted(versions.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def device_facts() -> dict[str, str]:
    """Return the name of this process's device, its driver, and the versions of the libraries that torch was built with."""
    kind = device_type()
    facts = {"type": kind, "name": platform.machine(), "driver": ""}
    if kind == "cuda":
        facts["name"] = torch.cuda.get_device_name()
        facts["build"] = torch.version.cuda or torch.version.hip or ""
        facts["driver"] = _driver()
        if torch.distributed.is_nccl_available():
            facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    elif kind != "cpu":
        facts["name"] = str(getattr(torch, kind).get_device_name())
    return facts


def _driver() -> str:
    """Return the version of NVIDIA's driver; empty where /proc does not have it."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            words = file.readline().split()
    except OSError:
        return ""
    return next((word for word in words if word[0].isdigit() and "." in word), "")


def facts() -> dict[str, Any]:
    """Return what identifies this stack."""
    return {**versions(), "digest": digest(all_packages()), "variables": variables()}


def versions() -> dict[str, Any]:
    """Return the versions of Python and of the judged packages, and the device."""
    return {"python": platform.python_version(), "packages": packages(), "device": device_facts()}


SWITCHES = (
    "NCCL_ALGO", "NCCL_PROTO", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUDA_LAUNCH_BLOCKING", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS", "DS_ACCELERATOR",
)  # fmt: skip


def variables() -> dict[str, str]:
    """Return the environment variables that change how libraries compute or send."""
    return {name: os.environ[name] for name in SWITCHES if name in os.environ}


def check_same_packages(world: World) -> tuple[str, dict[str, float], dict[str, float]]:
    """Compare the packages, Python and device of all ranks."""
    versions = all_packages() | {"python": platform.python_version()}
    device = device_facts()
    versions |= {f"device {name}": value for name, value in device.items() if value}
    everywhere = world.gather(versions)
    different = [name for name in sorted(set().union(*everywhere)) if len({each.get(name) for each in everywhere}) > 1]
    figures, bounds = {"different": float(len(different))}, {"different": 0.0}
    return "; ".join(_difference(name, everywhere) for name in different[:5]), figures, bounds


def _difference(name: str, everywhere: list[dict[str, str]]) -> str:
    """Say which ranks differ from most in one package."""
    of_ranks = [each.get(name, "not installed") for each in everywhere]
    usual = Counter(of_ranks).most_common(1)[0][0]
    others = {version: [rank for rank, each in enumerate(of_ranks) if each == version] for version in of_ranks}
    parts = [
        f"{version} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}"
        for version, ranks in others.items()
        if version != usual
    ]
    return f"{name} is {' and '.join(parts)}, elsewhere {usual}"
