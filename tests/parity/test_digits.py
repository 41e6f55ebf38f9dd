"""A tiny model learns to see on real scans; captchas are drawn again as they were."""

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


def test_captchas_are_those_of_every_other_measurement() -> None:
    pytest.importorskip("captcha")
    from benchmarks.captchas import draw

    first, again = (list(draw(3, 2)) for _ in range(2))
    assert [shown for _, shown in first] == [shown for _, shown in again]
    assert [image.tobytes() for image, _ in first] == [image.tobytes() for image, _ in again]
    assert len({image.tobytes() for image, _ in first}) == 3 and first[0][0].size == (90, 60)
    assert all(len(shown.split()) == 2 for _, shown in first)
