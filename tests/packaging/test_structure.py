"""The package has no import circles and no loose modules, and a run loads no file of a room that it does not use."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tools.loaded import Loaded

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def structure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("structure", ROOT / "tools" / "structure.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["structure"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_no_circles_and_no_loose_modules(structure: ModuleType) -> None:
    measured = structure.measure(ROOT)
    assert (measured.circles, measured.loose) == ([], [])


def write_tree(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = tmp_path / "dstune" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_circles_inside_functions_and_loose_modules_are_found(structure: ModuleType, tmp_path: Path) -> None:
    files = {
        "__init__.py": "",
        "a.py": "from dstune.data import rows\n",
        "data/__init__.py": "",
        "data/rows.py": "def f():\n    import dstune.a\n",
        "data/typed.py": (
            "from typing import TYPE_CHECKING\nimport dstune.data.user\nif TYPE_CHECKING:\n    import dstune.rank.worker\n"
        ),
        "data/user.py": "",
        "worker.py": "from dstune.data.typed import x\n",
    }
    measured = structure.measure(write_tree(tmp_path, files))
    assert measured.circles == [["dstune.a", "dstune.data.rows"]]
    assert measured.loose == ["a"]
    (tmp_path / "dstune" / "worker.py").write_text("x = 1\n" * 100)
    assert structure.measure(tmp_path).loose == ["a", "worker"]


def test_two_trees_stand_beside_each_other(structure: ModuleType, tmp_path: Path, capsys) -> None:
    old = write_tree(tmp_path / "old", {"data/rows.py": "def f():\n    return 1\n", "loose.py": "x = 1\n"})
    new = write_tree(
        tmp_path / "new", {"tasks/chat/rows.py": "def f():\n    return 1\n", "core/x.py": "x = 1\ny = 2\n"}
    )
    assert structure.main([str(new), "--before", str(old)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["before", "now"]
    for row in (
        ["loose_modules", "1", "0"],
        ["data", "2"],
        ["tasks/chat", "2"],
        ["core", "2"],
    ):
        assert row in rows


def test_a_run_loads_no_file_of_an_unused_room(structure: ModuleType, capsys) -> None:
    assert structure.main([str(ROOT), "--loaded"]) == 0
    sections = [part.splitlines() for part in capsys.readouterr().out.split("\n\n")]
    assert sections[0][0].split() == ["now"]
    counts = {line.split("  ")[0]: int(line.split()[-1]) for line in sections[0][1:]}
    assert counts["files of unused rooms, launcher"] == counts["files of unused rooms, rank"] == 0
    launcher, rank = (
        {name: int(number) for name, number in map(str.split, rows)}
        for heading, *rows in sections
        if heading.startswith("modules loaded")
    )
    assert launcher["methods/qlora"] <= rank["methods/qlora"], "the keys and rules of every room are there"
    assert launcher["methods/lora"] < rank["methods/lora"], "and the rest of its own"
    assert launcher["all"] < 1500 < rank["all"], "torch and transformers are the rank's alone"


@pytest.mark.parametrize(
    ("file", "unused"),
    [
        ("tasks/chat/predict.py", []),
        ("tasks/reward/config.py", []),
        ("tasks/reward/head.py", ["tasks/reward/head.py"]),
        ("methods/_peft/model.py", []),
        ("methods/qlora/quantize.py", ["methods/qlora/quantize.py"]),
        ("train/loop.py", None),
    ],
)
def test_files_of_unused_rooms(file: str, unused: list[str] | None) -> None:
    assert Loaded(1, [Path(file)]).of_unused_rooms() == unused
