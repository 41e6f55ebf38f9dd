"""The table of architectures would show a fault: what it calls trained differs from the plain loop with any of twelve."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support.ranks import run_ranks
from support.tiny import write_dialogues

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from architecture_faults import FAULTS  # noqa: E402


def test_every_planted_fault_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    write_dialogues(tmp_path / "causal.jsonl", 24, turns=(1, 2))
    output, _ = run_ranks(ROOT / "benchmarks" / "architecture_faults.py", 2, str(tmp_path))
    found = json.loads(next(line for line in output.splitlines() if line.startswith("FOUND")).removeprefix("FOUND"))
    assert len(FAULTS) >= 10 and set(found) == {"none", *FAULTS}
    assert found.pop("none") == "equal"
    assert {fault: status for fault, status in found.items() if status != "wrong"} == {}
