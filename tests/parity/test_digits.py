"""A tiny model learns to see on real scans."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.digits import measure


@pytest.mark.slow
def test_a_tiny_model_learns_to_read_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    before, after, _ = measure(tmp_path)
    assert before < 0.3
    assert after > 0.75
