"""Runs that an earlier version began: upgraded or as they are, they continue, report and export as they would have there.

`tools/old_runs.py` makes the archive: a run of each task and each method that was killed in its third step of four, and
`expected.json` with the metrics and exports of the undisturbed runs.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstune.config.run_file import RUN_FORMAT
from tools import old_runs
from tools.case_server import Case, machine
from tools.side_by_side import Tree

ROOT = Path(__file__).parents[2]
SINCE = {"distillation", "reinforcement"}
"""Tasks that version 0.1.0 did not have; the later archive has them as features."""
TASKS = sorted({path.stem for path in (ROOT / "conf" / "task").glob("*.yaml")} - SINCE)
NAMES = [f"task-{task}" for task in TASKS]
NAMES += [f"method-{path.stem}" for path in sorted((ROOT / "conf" / "method").glob("*.yaml")) if path.stem != "full"]

ARCHIVES = {"14c13ec": NAMES, "4d14d4f": [*NAMES, *(f"feature-{feature}" for feature in old_runs.FEATURES)]}
"""The runs of each earlier version."""


class Shelf:
    """The unpacked archive, and this tree to go on with its runs."""

    def __init__(self, folder: Path, commit: str):
        self.folder = folder
        with tarfile.open(ROOT / "tests" / "data" / f"old-runs-{commit}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
        content = json.loads((folder / "expected.json").read_text())
        self.expected, self.same_machine = content["runs"], content["machine"] == machine()
        self.tree = Tree(ROOT, folder / "served", models=folder / "models")

    def call(self, name: str, *argv: str, ranks: int = 0) -> object:
        return self.tree.run(Case(name, list(argv), ranks, str(self.folder), f"runs/{name}"), again=True)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Shelf]:
    shelf = Shelf(tmp_path_factory.mktemp("old"), request.param)
    yield shelf
    shelf.tree.close()


@pytest.mark.parametrize("shelf", ARCHIVES, indirect=True)
def test_every_task_and_method_has_a_run(shelf: Shelf, request: pytest.FixtureRequest) -> None:
    assert sorted(shelf.expected) == sorted(ARCHIVES[request.node.callspec.params["shelf"]])


@pytest.mark.parametrize(
    ("shelf", "name"), [(commit, name) for commit, names in ARCHIVES.items() for name in names], indirect=["shelf"]
)
def test_an_old_run_goes_on(shelf: Shelf, name: str) -> None:
    run = f"runs/{name}"
    if name.startswith("task-"):  # the others are read as they are
        upgraded = shelf.call(name, "upgrade", run)
        assert upgraded.exit_code == 0, upgraded.log
        assert f"format: {RUN_FORMAT}\n" in (shelf.folder / run / "run.yaml").read_text()
    done = shelf.call(name, "train", run, ranks=1)
    assert done.exit_code == 0, (done.log, done.problems)
    expected = shelf.expected[name]
    assert [sorted(row) for row in done.metrics] == [sorted(row) for row in expected["metrics"]]
    for row, before in zip(done.metrics, expected["metrics"], strict=True):
        # Of log-probabilities of the sampler and of training, what differs is rounding: one unit of fp32 near 8 is 1e-6.
        assert row == (before if shelf.same_machine else pytest.approx(before, rel=1e-4, abs=1e-6)), row["step"]
    tensors = {key: digest for key, digest in done.export.items() if ".safetensors:" in key}
    before = {key: digest for key, digest in expected["export"].items() if ".safetensors:" in key}
    # Exports hold every tensor of the base by now: the pooler of an encoder whose vectors are means was left out once.
    added = tensors.keys() - before.keys()
    assert before and before.keys() <= tensors.keys() and all(":pooler." in key for key in added)
    assert {key: tensors[key] for key in before} == before or not shelf.same_machine
    assert (shelf.folder / run / "report.html").is_file()
    exported = shelf.call(name, "export", run, "--out", f"again-{name}")
    assert exported.exit_code == 0, exported.log
