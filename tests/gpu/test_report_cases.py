"""Every case of `make gpu-report` on this machine's GPUs: that it runs through, and what its figures have to hold to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_report
from tests.gpu.test_gpu import gpus

pytestmark = pytest.mark.gpu

CASES = {name: seconds for part in gpu_report.PARTS.values() for name, seconds in part.items()}
EXPECTED: dict[str, Callable[[list[dict[str, Any]]], bool]] = {
    "losses": lambda rows: all(row["loss_apart"] < 1e-4 for row in rows if "loss_apart" in row),
    "attention": lambda rows: all(row["apart"] < 0.05 for row in rows if "apart" in row),
    "packed_step": lambda rows: any("varlen" in str(row.get("attention")) for row in rows),
    "cross_entropy": lambda rows: all(row["apart"] < 1e-2 for row in rows if row.get("way") == "chunks"),
    "plan": lambda rows: all(0.9 < row["ratio"] < 1.1 for row in rows if "ratio" in row),
    "out_of_memory": lambda rows: any("most first" in row.get("failed", "") for row in rows),
    "deterministic": lambda rows: all(row["value"] for row in rows if "value" in row),
    "resume": lambda rows: all(row["value"] for row in rows if "value" in row),
}
"""What the rows of a case have to show, beside that it has run."""
MAY_BE_ABSENT = ("not installed", "TRL is not installed", "needs several GPUs: GPUS=8")


def failures(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of what should have been computed and was not: a case goes on behind a run or a kernel that fails."""
    foreseen = {"out_of_memory": {"forced"}}.get(name, set())
    found = [row for row in rows if "failed" in row and row["failed"] not in MAY_BE_ABSENT]
    # Other kernels than torch's may be built for another device, and are then passed over.
    return [row for row in found if row.get("run") not in foreseen and "varlen" in row.get("kernel", "varlen")]


@pytest.mark.parametrize("name", CASES)
def test_a_case_of_the_report(name: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    if gpus() == 0:
        pytest.skip("no CUDA GPU on this machine")
    options = argparse.Namespace(simulate=False, gpus=gpus())
    result = gpu_report.run_case(name, 2 * CASES[name], tmp_path, options)
    for row in result["rows"]:
        record_property(name, row)
    assert result["outcome"] == "ok", result.get("last_lines")
    assert not failures(name, result["rows"])
    assert EXPECTED.get(name, bool)(result["rows"]), result["rows"]
