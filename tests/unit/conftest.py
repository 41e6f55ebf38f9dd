"""What several files of unit tests use and takes long to make."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """Exports' runs (`tests/support/exports.py`), which take minutes to train."""
    from tests.support.exports import filled_shelf

    return filled_shelf(tmp_path_factory.mktemp("export"))
