"""Write the tier of each test of some files as JSON: `python tests/support/collected_tiers.py OUTPUT FILE ...`"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


class Tiers:
    """Reads the marks after `tests/conftest.py` has added its own."""

    def __init__(self) -> None:
        self.tiers: dict[str, str] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            marks = {mark.name for mark in item.iter_markers()}
            tier = next((f"make test-{name}" for name in ("slow", "ci") if name in marks), "make test")
            self.tiers[f"{item.path.relative_to(TESTS).as_posix()}::{item.name}"] = tier


def main(output: str, *files: str) -> int:
    tiers = Tiers()
    code = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *files], plugins=[tiers])
    Path(output).write_text(json.dumps(tiers.tiers))
    return int(code)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
