"""One small model for the tests of the local engine, the engine that serves it, and what transformers writes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.local_engine import Engine, greedy
from tests.support.tiny import save_decoder


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("local") / "base")


@pytest.fixture(scope="package")
def engine(folder: Path) -> Iterator[Engine]:
    made = Engine(folder)
    yield made
    made.close()


@pytest.fixture(scope="package")
def plain(folder: Path) -> Callable[[str, int], str]:
    return greedy(folder)
