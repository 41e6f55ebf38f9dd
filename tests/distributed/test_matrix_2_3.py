"""The whole matrix at ZeRO stages 2 and 3: two files, so that two workers share it."""

from __future__ import annotations

import pytest
from support.matrix import Table, check_stage


@pytest.mark.timeout(1200)  # minutes, and more beside other work
@pytest.mark.parametrize("stage", [2, 3])
def test_the_whole_matrix(tmp_path, monkeypatch, stage):
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    check_stage(Table(tmp_path), stage)
