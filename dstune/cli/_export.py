"""Runs `dstune export`, and gives it the evaluation that measures the cost of quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def main(argv: list[str]) -> int:
    """Export, and return the exit code. Raises UserError."""
    from dstune.inference import export_command

    return export_command.main(argv, _measure)


def _measure(run: Path, folder: Path) -> dict[str, Any] | None:
    from dstune.evaluation.command import measure_weights

    return measure_weights(run, folder)
