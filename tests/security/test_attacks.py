"""The table of attacks in docs/security.md, and the tests that it names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from benchmarks import attack_mutations, device_mutations, fault_mutations
from benchmarks.attacks import ATTACKS, TESTS, table

ROOT = Path(__file__).parents[2]


def names_in(file: Path) -> set[str]:
    nodes = ast.parse(file.read_text(encoding="utf-8")).body
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_there_are_at_least_forty_kinds() -> None:
    assert len({one.what for one in ATTACKS}) >= 40


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.test)
def test_each_attack_has_its_test(attack) -> None:
    file, _, name = attack.test.partition(".")
    assert name in names_in(TESTS / f"test_{file}.py")


def test_each_attack_has_what_undoes_its_defence() -> None:
    """And each change is of a text that the code has."""
    assert {one.place for one in ATTACKS} <= attack_mutations.MUTATIONS.keys()
    for tables in (attack_mutations, fault_mutations, device_mutations):
        for mutation in tables.MUTATIONS.values():
            for change in mutation.changes:
                change.applied(ROOT)


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    assert table() in page, "python tools/guides.py"
