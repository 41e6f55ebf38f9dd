"""dstune without some of its wings: the import contracts, the types and tests of what is left hold, and help lists no more."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STANDS_ON = {
    "finetuning": ("serve",),
    "guard": ("serve",),
    "serve": (),
    "lakehouse": (),
    "importing": (),
    "monitor": ("serve",),
    "recording": (),
    "synthesize": (),
    "cycle": ("monitor", "serve"),
}
"""The wings that each needs beside the core."""
VERBS = {
    "serve": {"serve", "serve-keys"},
    "guard": {"guard"},
    "importing": {"import"},
    "monitor": {"monitor"},
    "recording": {"compare", "record", "retrain"},
    "synthesize": {"synthesize"},
    "cycle": {"cycle"},
}
CORE = ("test_config_compose", "test_config_words", "test_registry", "test_samples", "test_schedule")
"""Of `tests/unit`, without ranks."""
OF_WING = {
    "finetuning": "test_rows.py",
    "guard": "test_readings.py",
    "serve": "test_store.py",
    "lakehouse": "test_ordered.py",
    "importing": "test_importing.py",
    "monitor": "test_two_sample.py",
    "recording": "test_record.py",
    "synthesize": "test_synthesize.py",
    "cycle": "test_registry.py",
}


def with_what_stands_on(wings: frozenset[str]) -> frozenset[str]:
    return wings.union(wing for wing, needed in STANDS_ON.items() if not wings.isdisjoint(needed))


def removals() -> Iterator[frozenset[str]]:
    """One wing or two with what stands on them, and all: an import of a wing is seen where it alone is gone."""
    for count in (1, 2):
        for gone in map(frozenset, itertools.combinations(STANDS_ON, count)):
            yield with_what_stands_on(with_what_stands_on(gone))
    yield frozenset(STANDS_ON)


REMOVALS = sorted({*removals()}, key=sorted)
ONE_BY_ONE = [
    frozenset({"finetuning"}),
    frozenset({"guard"}),
    frozenset({"finetuning", "guard", "serve", "monitor", "cycle"}),
    frozenset({"cycle"}),
    frozenset({"monitor", "cycle"}),
    frozenset({"lakehouse"}),
    frozenset({"importing"}),
    frozenset({"recording"}),
    frozenset({"synthesize"}),
    frozenset(STANDS_ON),
]
"""Each wing with what stands on it, and all of them."""


def name_of(gone: frozenset[str]) -> str:
    return "+".join(sorted(gone))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in one place, so that mypy reads a file once for all tests."""
    tree = tmp_path_factory.mktemp("wings") / "tree"
    for name in (
        "dstune",
        "dstune_plugins",
        "dstune_verify",
        "conf",
        "tests",
        "tools",
        "benchmarks",
        "docs",
        "examples",
    ):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree


@pytest.fixture
def without(tree: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The copy without the wings and their tests."""
    folders = [f"{parent}/{wing}" for wing in request.param for parent in ("dstune", "tests")]
    for folder in folders:
        shutil.move(tree / folder, tmp_path / folder)
    yield tree
    for folder in folders:
        shutil.rmtree(tree / folder, ignore_errors=True)  # a cache of bytecode may be there again
        shutil.move(tmp_path / folder, tree / folder)


def done(tree: Path, *words: str) -> str:
    env = {
        **os.environ,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "tests")]),
        "COLUMNS": "200",
    }
    process = subprocess.run(
        [sys.executable, *words], cwd=tree, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_the_graph_is_that_of_the_import_contracts() -> None:
    wings = {place.parent.name for place in (ROOT / "dstune").glob("*/*.py") if place.stem in MODULES_OF_WINGS}
    assert wings | {"finetuning"} == STANDS_ON.keys()
    assert len(REMOVALS) == 41
    assert set(ONE_BY_ONE) < set(REMOVALS)


MODULES_OF_WINGS = ("verbs", "launchers", "model_registries", "packaged_samples", "gateway_routes", "engine_kinds")


@pytest.mark.parametrize("without", REMOVALS, ids=name_of, indirect=True)
def test_imports_and_the_help_of_what_is_left(without: Path, request: pytest.FixtureRequest) -> None:
    gone = request.node.callspec.params["without"]
    contracts = Path(sys.executable).with_name("lint-imports")
    done(without, str(contracts), "--no-cache")
    listed = set(re.findall(r"(?m)^  ([a-z-]+) {2,}", done(without, "-m", "dstune", "--help").split("examples:")[0]))
    absent = {verb for wing in gone for verb in VERBS.get(wing, ())}
    present = {verb for wing, verbs in VERBS.items() if wing not in gone for verb in verbs}
    assert listed.isdisjoint(absent)
    assert present | {"train", "plan", "export"} <= listed
    # No import is left that leads nowhere, even inside a function: grimp would take it for an external package.
    left = [
        f"{file.relative_to(without)}: {wing}"
        for file in (without / "dstune").rglob("*.py")
        for wing in gone
        if re.search(rf"(?m)^\s*(from|import) dstune\.{wing}\b", file.read_text())
    ]
    assert left == []


@pytest.mark.parametrize("without", ONE_BY_ONE, ids=name_of, indirect=True)
def test_types_and_tests_of_what_is_left(without: Path, request: pytest.FixtureRequest) -> None:
    gone = request.node.callspec.params["without"]
    done(without, "-m", "mypy")
    tests = [f"tests/unit/{name}.py" for name in CORE]
    tests += [f"tests/{wing}/{file}" for wing, file in OF_WING.items() if wing not in gone]
    done(without, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow and not ci and not gpu", *tests)
