"""Each route of docs/evidence.md has a test that is collected, in the tier that the page says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.routes import Route, refused_skip, routes

ROOT = Path(__file__).parents[2]
TABLE = routes()
EVERY_PUSH = (
    "launch=slurm launch.nodes=2",
    "launch=slurm sweep.parallel",
    "deepspeed --hostfile hosts --module",
    "deepspeed --num_gpus 2 --module",
    "mpirun -n 2",
    "sweep=optuna",
    "tracking.wandb.mode=offline",
)
"""Parts of the commands that dstune exists for: `make test` runs each."""


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> dict[str, str]:
    """The tier of each test of the named files."""
    output = tmp_path_factory.mktemp("routes") / "tiers.json"
    files = sorted({f"tests/{route.test.partition('::')[0]}" for route in TABLE})
    command = [sys.executable, "tests/support/collected_tiers.py", str(output), *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(output.read_text())


def faults(table: list[Route], collected: dict[str, str]) -> list[str]:
    """Return a sentence for each row whose test is not collected, or is in another tier than the row says."""
    sentences = []
    for route in table:
        cases = {test: tier for test, tier in collected.items() if route.test in (test, test.partition("[")[0])}
        if not cases:
            sentences.append(f"{route.test} is not collected")
        sentences += [
            f"{test} is in `{tier}`, not `{route.tier}`" for test, tier in cases.items() if tier != route.tier
        ]
    return sentences


def test_each_route_is_collected_in_its_tier(collected: dict[str, str]) -> None:
    assert faults(TABLE, collected) == []


def test_a_row_whose_test_moved_or_went_is_reported() -> None:
    collected = {"a.py::test_one[x]": "make test", "a.py::test_one[y]": "make test-slow"}
    table = [Route("p", "a.py::test_one[x]", "make test"), Route("q", "a.py::test_gone", "make test")]
    assert faults(table, collected) == ["a.py::test_gone is not collected"]
    whole = [Route("p", "a.py::test_one", "make test")]
    assert faults(whole, collected) == ["a.py::test_one[y] is in `make test-slow`, not `make test`"]


@pytest.mark.parametrize("part", EVERY_PUSH)
def test_what_dstune_exists_for_is_in_make_test(part: str) -> None:
    assert "make test" in {route.tier for route in TABLE if part in route.command}


def test_each_launcher_has_a_route() -> None:
    launchers = {file.stem for file in (ROOT / "conf" / "launch").glob("*.yaml")}
    assert launchers
    without = {name for name in launchers if not any(f"launch={name}" in route.command for route in TABLE)}
    assert without == set()


def test_a_skip_of_a_route_is_a_failure_where_its_packages_are_installed() -> None:
    table = [Route("p", "cluster/test_uses.py::test_one", "make test")]
    assert "no namespaces" in (refused_skip("cluster/test_uses.py::test_one[x]", "no namespaces", [], table) or "")
    assert refused_skip("cluster/test_uses.py::test_one[x]", "not installed", ["slurmd"], table) is None
    assert refused_skip("cluster/test_uses.py::test_two", "no namespaces", [], table) is None
