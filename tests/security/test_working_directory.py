"""Python processes that dstune starts import nothing from the folder in which a command is given."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.tiny import save_decoder

from dstune.core.child_python import child_environment, python_path
from dstune.core.errors import UserError
from dstune.cycle import training
from dstune.data import blocks
from dstune.launch import checks, hosts
from dstune.samples import download
from dstune.serve.engines.special import SpecialTexts
from dstune.serve.source import resolve
from dstune.serve.state import MARK, state_folder

ROOT = Path(__file__).parents[2]
TRAP = """
import sys
open({marker!r}, "a").write(__name__ + "\\n")
sys.path[:] = [place for place in sys.path if place not in ("", {folder!r})]
del sys.modules[__name__]
import importlib
sys.modules[__name__] = importlib.import_module(__name__)
"""
"""Leaves a marker and gives its place to the real module."""
NAMES = (
    "argparse",
    "asyncio",
    "dataclasses",
    "json",
    "logging",
    "pip",
    "queue",
    "runpy",
    "socket",
    "torch",
    "transformers",
    "yaml",
)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user stands in a folder with modules that are called like those that every program imports."""
    marker, folder = tmp_path / "marker", tmp_path / "theirs"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(TRAP.format(marker=str(marker), folder=str(folder)))
    monkeypatch.chdir(folder)
    for name in ("PYTHONSAFEPATH", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    return marker


def test_the_traps_work(marker: Path) -> None:
    subprocess.run([sys.executable, "-c", "import json"], check=True)
    assert marker.read_text().split() == ["json"]


@pytest.mark.parametrize("inherited", ["", ":", f"{os.pathsep}/nowhere"])
def test_a_child_of_python(marker: Path, inherited: str) -> None:
    environment = child_environment({**os.environ, "PYTHONPATH": inherited})
    done = subprocess.run([sys.executable, "-m", "dstune", "--version"], env=environment, capture_output=True)
    assert done.returncode == 0
    assert not marker.exists()


def test_empty_places_are_left_out() -> None:
    assert "" not in python_path(f"/a{os.pathsep}{os.pathsep}/b{os.pathsep}").split(os.pathsep)
    assert python_path(f"/a{os.pathsep}{os.pathsep}/b").endswith(f"/a{os.pathsep}/b")


def test_doctor(marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "INSIDE", "import json")
    assert list(checks.software())
    assert not marker.exists()


def test_the_probe_of_this_machine(marker: Path) -> None:
    assert hosts.here([])
    assert not marker.exists()


def test_pip(marker: Path) -> None:
    assert download._pip("--version", capture_output=True).returncode == 0
    assert not marker.exists()


def test_a_tokenizer_in_a_process_of_its_own(marker: Path, tmp_path: Path) -> None:
    save_decoder(tmp_path / "model")
    SpecialTexts.from_source(resolve("", str(tmp_path / "model")))
    assert not marker.exists()


def test_rows_in_a_process_of_their_own(marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks.pickle, "dump", lambda *_: None)  # it ends at the end of its input
    process = blocks._start(None)
    process.stdin.close()
    process.wait()
    assert not marker.exists()


def test_the_training_of_a_cycle(marker: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(training.TrainingFailed):  # there is no run.yaml
        training.train(tmp_path / "run")
    assert not marker.exists()


def test_wandb_sends_nothing_where_the_folder_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B reads `wandb/settings` of the working directory: whoever chooses the server there gets the user's key."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nbase_url = http://stranger.invalid\n")
    monkeypatch.chdir(tmp_path)
    program = (
        "from dstune.tracking.trackers import wandb as tracker; import wandb; tracker.ignore_working_directory(wandb);"
    )
    program += "print(wandb.setup().settings.base_url)"
    given = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=child_environment(given), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("http") and "stranger" not in done.stdout
    assert Path.cwd() == tmp_path


ELSEWHERE = {
    "launch/hosts.py:_ask": "words of ssh: the other host's home folder",
    "launch/hosts.py:look": "words of ssh",
    "launch/hostfile/run.py:_open": "words of ssh",
    "launch/remote.py:_open_nodes": "words of ssh",
    "launch/remote.py:run": "words of mpirun; the variables of ranks are in the plan",
    "launch/processes.py:__init__": "a file, whose folder is dstune's",
    "launch/local/warm.py:_launch": "variables of a rank, whose plan has it",
    "lakehouse/spark/task.py:_supervise": "variables of a rank, whose plan has it",
    "samples/download.py:fetch_with": "npm, in a folder that was just made",
}
SAFE = {"child_environment", "SAFE_PATH"}


def names_in(node: ast.AST, assigned: Mapping[str, ast.AST]) -> set[str]:
    """The names in an expression, and those in what they were assigned."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    others = {name: value for name, value in assigned.items() if name not in names}
    return names.union(*(names_in(assigned[name], others) for name in names & assigned.keys()))


def is_python(words: ast.AST, assigned: Mapping[str, ast.AST]) -> bool:
    """Whether the words of a command may start Python with the working directory in front of its import path."""
    if isinstance(words, ast.Name) and words.id in assigned:
        return is_python(assigned[words.id], {})
    if not isinstance(words, (ast.List, ast.Tuple)) or not words.elts:
        return True
    if any(isinstance(word, ast.Constant) and word.value == "-I" for word in words.elts):
        return False
    return isinstance(words.elts[0], ast.Starred) or ast.unparse(words.elts[0]) == "sys.executable"


def functions_of(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_every_python_process_gets_an_environment() -> None:
    """What the others above do by hand, for every place that may start one: the environment comes from `child_environment`."""
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted((ROOT / "dstune").rglob("*.py"))}
    makers = SAFE | {
        function.name
        for tree in trees.values()
        for function in functions_of(tree)
        if any(
            isinstance(node, ast.Return) and node.value and names_in(node.value, {}) & SAFE
            for node in ast.walk(function)
        )
    }
    without, looked_at = [], 0
    for file, tree in trees.items():
        if "sys.executable" not in ast.unparse(tree):
            continue
        # Functions inside of others come after them.
        function_by_call = {
            call: function
            for function in functions_of(tree)
            for call in ast.walk(function)
            if isinstance(call, ast.Call)
        }
        for call, function in function_by_call.items():
            if ast.unparse(call.func) not in ("subprocess.run", "subprocess.Popen"):
                continue
            assigned = {
                node.targets[0].id: node.value
                for node in ast.walk(function)
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            }
            if not is_python(call.args[0], assigned):
                continue
            looked_at += 1
            place = f"{file.relative_to(ROOT / 'dstune')}:{function.name}"
            env = next((keyword.value for keyword in call.keywords if keyword.arg == "env"), None)
            if place not in ELSEWHERE and (env is None or not names_in(env, assigned) & makers):
                without.append(place)
    assert looked_at > 25
    assert without == []


@pytest.mark.parametrize("copied", [False, True])
def test_a_state_folder_of_somebody_else_is_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    """Whoever made it knows the keys of its database, though a tar makes this user the owner of its files."""
    strangers = tmp_path / "strangers"
    strangers.mkdir()
    monkeypatch.chdir(strangers)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config-of-the-stranger"))
    made = state_folder(None, create=True)
    (made / "dstune.db").touch()
    if not copied:
        (made / MARK).unlink()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config-of-the-user"))
    for create in (True, False):
        with pytest.raises(UserError) as error:
            state_folder(None, create=create)
        assert [problem.where for problem in error.value.problems] == ["--state"]
