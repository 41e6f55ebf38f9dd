"""What holds for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """The verbs set variables for the ranks they start (HF_HUB_OFFLINE and others): no test is to inherit another's."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
