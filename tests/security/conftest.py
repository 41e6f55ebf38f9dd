"""What several files of attacks start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstune.core import plugins
from tests.support.stranger import Stranger


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stranger:
    plugins._active.clear()  # of tests before
    return Stranger(tmp_path, monkeypatch)
