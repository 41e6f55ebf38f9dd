"""The wording of errors is the committed one; `make golden` writes it anew, and the diff is the review."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.ci  # two minutes: each line is composed
@pytest.mark.timeout(1200)  # beside other work
def test_problems_are_worded_as_committed() -> None:
    spec = importlib.util.spec_from_file_location("golden", ROOT / "tools" / "golden.py")
    assert spec is not None and spec.loader is not None
    golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden)
    said, committed = golden.render().splitlines(), golden.GOLDEN.read_text(encoding="utf-8").splitlines()
    assert said == committed, "make golden"
    assert "  accepted" not in said
