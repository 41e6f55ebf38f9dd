"""Models whose rows choose the weights that they read equal a plain loop at ZeRO 0 to 2, on two and three ranks.

Experts of Switch and NLLB-MoE are modules of their own. Only Switch has ranks with different gradients here: transformers 5.24
calls the first two experts of NLLB-MoE alone, for any row. LED reads its embeddings again for some rows. Stage 3 is refused, with
a fix that trains.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from support.ranks import run_ranks
from support.tiny import write_pairs

PROGRAM = Path(__file__).with_name("routed_ranks.py")
KINDS = ("switch_transformers", "nllb-moe", "led")


def trained(folder: Path, size: int, cases: list[tuple[str, str, int]], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setenv("DSTUNE_CACHE", str(folder / "cache"))
    write_pairs(folder / "seq2seq.jsonl", 16)
    output = run_ranks(PROGRAM, size, {"cases": cases, "work": str(folder)})[0]
    return [json.loads(line.removeprefix("RESULT ")) for line in output.splitlines() if line.startswith("RESULT ")]


@pytest.mark.ci
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_they_equal_a_plain_loop(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [*product(KINDS, ("full", "lora"), (0, 1, 2))]
    results = trained(tmp_path, size, cases, monkeypatch)
    assert len(results) == len(cases)
    assert [result for result in results if result["status"] != "equal"] == []


@pytest.mark.ci
def test_stage_3_is_refused_with_a_stage_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`zero=stage2`, which the test above trains."""
    cases = [(kind, method, 3) for kind in KINDS for method in ("full", "lora")]
    results = trained(tmp_path, 2, cases, monkeypatch)
    answers = [(result["status"], result.get("where"), result.get("fix")) for result in results]
    assert answers == [("refused", "zero.stage", "zero=stage2")] * len(cases)
