"""Reading DeepSpeed's shards without running what is in them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

KNOWN = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)
"""Classes of DeepSpeed whose objects stand in its shards; they hold numbers."""


def load(path: Path, map_location: Any = "cpu", *, mmap: bool = False) -> Any:
    """The state in `path`, with torch's unpickler that builds tensors, containers and numbers, and objects of KNOWN.
    Raises ValueError where the file holds anything else."""
    expected = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    if expected - KNOWN:
        others = ", ".join(sorted(expected - KNOWN))
        raise ValueError(f"{path} holds more than tensors and settings, and is not read: {others}")
    classes = [getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in expected]
    with torch.serialization.safe_globals(classes):
        return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
