"""Branches on classes outside their rooms, loose modules, import circles and dialect become fewer, never more."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tools.loaded import Loaded

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ratchet() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ratchet", ROOT / "tools" / "ratchet.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ratchet"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_counts_fall_only(ratchet: ModuleType) -> None:
    committed = json.loads((ROOT / ratchet.RECORD).read_text(encoding="utf-8"))
    assert ratchet.rises(committed, ratchet.measure(ROOT).numbers()) == [], "tools/ratchet.py --sites COUNT lists them"


CONFIG = """
from dataclasses import dataclass
from dstune.protocols import TaskConfig
@dataclass(frozen=True)
class ChatConfig(TaskConfig):
    name: str = "chat"
@dataclass(frozen=True)
class LoraConfig:
    name: str = "lora"
TEXTS = (ChatConfig,)
@task
class Chat(Task):
    Config = ChatConfig
"""
BRANCHES = {
    "branches.task": "def f(config):\n    return isinstance(config.task, TEXTS | ChatConfig)\n",
    "branches.method": "def f(method):\n    match method:\n        case LoraConfig(rank=8):\n            return 1\n",
    "branches.task ": "def f(run):\n    return isinstance(task_of(run.task), Chat)\n",
    "branches.by_name": "def f(config):\n    return config.task.name in ('chat',)\n",
    "branches.by_field": "def f(config):\n    return getattr(config.method, 'rank', 0)\n",
    "branches.reasoned": "def f(config):\n    return isinstance(config.task, ChatConfig)  # branch: an old format\n",
    "dialect": "def f():\n    toldNames = 1\n",
    "dialect ": "MOST_TOLD = 1\n",
    "dialect  ": "untold = 1\n",
}


def house(tmp_path: Path, files: dict[str, str]) -> Path:
    for folder, names in {"task": ["chat"], "method": ["lora"]}.items():
        (tmp_path / "conf" / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / "conf" / folder / f"{name}.yaml").touch()
    for name, text in ({"config/schema.py": CONFIG} | files).items():
        path = tmp_path / "dstune" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize("count", BRANCHES)
def test_a_branch_is_counted_outside_its_room_alone(ratchet: ModuleType, tmp_path: Path, count: str) -> None:
    empty = ratchet.measure(house(tmp_path / "empty", {})).numbers()
    text, count = BRANCHES[count], count.strip()
    outside = ratchet.measure(house(tmp_path / "outside", {"data/rows.py": text})).numbers()
    assert outside[count] == empty[count] + 1
    rooms = {"tasks/chat/rows.py": text, "methods/lora.py": text}
    inside = ratchet.measure(house(tmp_path / "inside", rooms)).numbers()
    # Each of the two files is a room of one kind, and stands outside the rooms of the other.
    assert inside[count] == empty[count] + (2 if count == "dialect" else 1)


def test_a_helper_beside_the_rooms_is_outside_of_them(ratchet: ModuleType, tmp_path: Path) -> None:
    files = {"tasks/helpers.py": BRANCHES["branches.task"], "methods/_helpers.py": BRANCHES["branches.method"]}
    counts = ratchet.measure(house(tmp_path, files)).numbers()
    assert (counts["branches.task"], counts["branches.method"]) == (1, 1)


def test_circles_inside_functions_and_loose_modules_are_found(ratchet: ModuleType, tmp_path: Path) -> None:
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
    counts = ratchet.measure(house(tmp_path, files))
    assert counts.circles == [["dstune.a", "dstune.data.rows"]]
    assert counts.loose == ["a"]
    (tmp_path / "dstune" / "worker.py").write_text("x = 1\n" * 100)
    assert ratchet.measure(tmp_path).loose == ["a", "worker"]


def test_two_trees_stand_beside_each_other(ratchet: ModuleType, tmp_path: Path, capsys) -> None:
    old = house(tmp_path / "old", {"data/rows.py": BRANCHES["branches.task"], "loose.py": "x = 1\n"})
    new = house(tmp_path / "new", {"tasks/chat/rows.py": BRANCHES["branches.task"], "core/x.py": "x = 1\ny = 2\n"})
    assert ratchet.main([str(new), "--before", str(old)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["before", "now"]
    for row in (
        ["branches.task", "1", "0"],
        ["loose_modules", "1", "0"],
        ["data", "2"],
        ["tasks/chat", "2"],
        ["core", "2"],
    ):
        assert row in rows


def test_a_run_loads_no_file_of_an_unused_room(ratchet: ModuleType, capsys) -> None:
    assert ratchet.main([str(ROOT), "--loaded"]) == 0
    sections = [part.splitlines() for part in capsys.readouterr().out.split("\n\n")]
    assert sections[0][0].split() == ["committed", "now"]
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


def test_a_rise_is_reported_and_not_written(ratchet: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    tree = house(tmp_path, {"data/rows.py": BRANCHES["branches.task"]})
    (tree / "tools").mkdir()
    record = tree / ratchet.RECORD
    record.write_text(json.dumps(ratchet.measure(tree).numbers() | {"branches.task": 0, "dialect": 3}))
    monkeypatch.setattr(ratchet, "HOME", tree)
    assert ratchet.main([str(tree), "--update"]) == 1
    assert "branches.task: 0 -> 1" in capsys.readouterr().out
    written = json.loads(record.read_text())
    assert (written["branches.task"], written["dialect"]) == (0, 0)
    assert ratchet.main([str(tree), "--update", "--raise", "branches.task"]) == 0
    assert json.loads(record.read_text())["branches.task"] == 1
