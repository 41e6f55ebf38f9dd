"""What holds for every test."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl.logging import PythonHandler

LONG_FIRST = ("distributed", "cluster", "parity", "packaging", "unit")
"""Folders by how long a file of theirs takes: workers that take whole files end together when the short ones come last."""

# A shell that starts `make test` in the background has it ignore Ctrl-C, and every command under test would with it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Hydra closes all handlers of logging, and that of absl (of rouge-score) closes its stream, unless it is sys.stderr: within a
# test of `capsys` that is another one, and pytest's own would be closed under all tests that follow.
PythonHandler.close = logging.StreamHandler.close


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """The verbs set variables for the ranks they start (HF_HUB_OFFLINE and others): no test is to inherit another's."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return LONG_FIRST.index(folder) if folder in LONG_FIRST else len(LONG_FIRST)

    items.sort(key=place)
