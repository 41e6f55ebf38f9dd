"""The matrix: each method at each ZeRO stage trains, resumes to the bit, exports, and loads again with equal outputs."""

from __future__ import annotations

import pytest
from support.matrix import METHODS, ONLY_IN_THE_WHOLE_MATRIX, STAGES, Table, check, possible, refusals


@pytest.fixture
def table(tmp_path, monkeypatch) -> Table:
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    return Table(tmp_path)


@pytest.mark.ci
def test_each_method(table):
    """At stage 3, where most can go wrong; 4-bit weights at stage 2."""
    cells = [(name, 3 if possible(name, 3) else 2) for name in METHODS if name not in ONLY_IN_THE_WHOLE_MATRIX]
    results = table.run(cells)
    for result in results:
        check(result)
    # B moves `lr_ratio` times as far as it does at the rate of A.
    moved = {result["name"]: result["b_to_a"] for result in results if "b_to_a" in result}
    assert 4 < moved["lora+"] / moved["lora"] < 16
    rounding = {result["name"]: result["rounding"] for result in results if result["quantized"]}
    assert rounding["qlora from loftq"] < rounding["qlora"], "an adapter from LoftQ makes up for a part of the rounding"


def test_a_cell_that_cannot_be_is_refused_with_its_reason(table):
    for name in METHODS:
        for stage in STAGES:
            problems = refusals(table.config(name, stage))
            assert (not problems) is possible(name, stage), (name, stage, problems)
            assert all(problem.reason and problem.fix for problem in problems)
