"""Runs that an earlier version began: upgraded or as they are, they continue, report and export as they would have there.

`tools/old_runs.py` makes the archive: a run of each task and each method that was killed in its third step of four, and
`expected.json` with the metrics and exports of the undisturbed runs.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from dstune.config.run_file import RUN_FORMAT

ROOT = Path(__file__).parents[2]
ARCHIVES = sorted((ROOT / "tests" / "data").glob("old-runs-*.tar.xz"))
NAMES = [f"task-{path.stem}" for path in sorted((ROOT / "conf" / "task").glob("*.yaml"))]
NAMES += [f"method-{path.stem}" for path in sorted((ROOT / "conf" / "method").glob("*.yaml")) if path.stem != "full"]


@pytest.fixture(scope="module")
def side_by_side() -> ModuleType:
    spec = importlib.util.spec_from_file_location("side_by_side", ROOT / "tools" / "side_by_side.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["side_by_side"] = module
    spec.loader.exec_module(module)
    return module


class Shelf:
    """The unpacked archive, and this tree to go on with its runs."""

    def __init__(self, folder: Path, tools: ModuleType):
        self.folder, self.tools = folder, tools
        with tarfile.open(ARCHIVES[-1]) as archive:
            archive.extractall(folder, filter="data")
        content = json.loads((folder / "expected.json").read_text())
        self.expected, self.same_machine = content["runs"], content["machine"] == tools.machine()
        self.tree = tools.Tree(ROOT, folder / "served", models=folder / "models")

    def call(self, name: str, *argv: str, ranks: int = 0) -> object:
        return self.tree.run(self.tools.Case(name, list(argv), ranks, str(self.folder), f"runs/{name}"), again=True)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, side_by_side: ModuleType) -> Iterator[Shelf]:
    shelf = Shelf(tmp_path_factory.mktemp("old"), side_by_side)
    yield shelf
    shelf.tree.close()


def test_every_task_and_method_has_a_run(shelf: Shelf) -> None:
    assert sorted(shelf.expected) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_old_run_goes_on(shelf: Shelf, name: str) -> None:
    run = f"runs/{name}"
    if name.startswith("task-"):  # those of methods are read as they are
        upgraded = shelf.call(name, "upgrade", run)
        assert upgraded.exit_code == 0, upgraded.log
        assert f"format: {RUN_FORMAT}\n" in (shelf.folder / run / "run.yaml").read_text()
    done = shelf.call(name, "train", run, ranks=1)
    assert done.exit_code == 0, (done.log, done.problems)
    expected = shelf.expected[name]
    assert [sorted(row) for row in done.metrics] == [sorted(row) for row in expected["metrics"]]
    for row, before in zip(done.metrics, expected["metrics"], strict=True):
        assert row == (before if shelf.same_machine else pytest.approx(before, rel=1e-4)), row["step"]
    tensors = {key: digest for key, digest in done.export.items() if ".safetensors:" in key}
    before = {key: digest for key, digest in expected["export"].items() if ".safetensors:" in key}
    assert tensors.keys() == before.keys() != set()
    assert tensors == before or not shelf.same_machine
    assert (shelf.folder / run / "report.html").is_file()
    exported = shelf.call(name, "export", run, "--out", f"again-{name}")
    assert exported.exit_code == 0, exported.log
