"""Whether an adapter's settings ask for more than its file holds: peft makes the matrices first, and fills them then."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstune.core.errors import Problem, UserError

SIZES = ("r", "init_r", "target_r", "num_virtual_tokens", "token_dim", "num_layers", "encoder_hidden_size")
"""Settings of peft that are sizes of matrices."""


def check_sizes(settings: Mapping[str, Any], folder: Path, where: str) -> None:
    """Check the sizes of an adapter. settings: of the adapter in `folder`. Raises UserError for a size beyond any that its file
    has."""
    from safetensors import SafetensorError, safe_open

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return  # refused elsewhere
    try:
        with safe_open(file, "np") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError):  # reported where the tensors are read
        return
    largest = max((max(shape, default=1) for shape in shapes), default=1)
    ranks = settings.get("rank_pattern")
    sizes = {name: settings.get(name) for name in SIZES} | dict(ranks if isinstance(ranks, dict) else {})
    for name, size in sizes.items():
        if isinstance(size, (int, float)) and size > largest:
            reason = f"its {name} is {size}, and none of its matrices has more than {largest} rows or columns"
            raise UserError(Problem(where, reason, "an adapter as peft saves it", str(folder)))
