"""What `make test` leaves to `make test-ci` is there, and its parts are all of it and take as long as each other."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
from support.tiers import LEFT_TO_SLOW, SECONDS, part_of

TESTS = Path(__file__).parents[1]


def test_every_named_file_is_there() -> None:
    """One that was renamed would be back in `make test`, and nobody would see it."""
    assert [file for file in SECONDS if not (TESTS / file).is_file()] == []


@pytest.mark.parametrize("pattern", LEFT_TO_SLOW)
def test_every_pattern_names_tests(pattern: str) -> None:
    file, test = pattern.split("::")
    functions = [node for node in ast.walk(ast.parse((TESTS / file).read_text())) if isinstance(node, ast.FunctionDef)]
    name = re.split(r"[^a-z_]", test)[0]
    assert any(function.name.startswith(name or "test_") for function in functions)


@pytest.mark.parametrize("parts", [1, 6, 8])
def test_parts_are_everything_and_alike(parts: int) -> None:
    files = {*SECONDS, "unit/test_not_named.py"}
    found = part_of(files, parts)
    assert found.keys() == files and set(found.values()) == set(range(1, parts + 1))
    seconds: Counter[int] = Counter()
    for file, part in found.items():
        seconds[part] += SECONDS.get(file, 0)
    assert max(seconds.values()) < 1.1 * min(seconds.values())
