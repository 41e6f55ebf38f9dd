"""The folder in which a command is given executes nothing that the user did not name as a file, and so do files of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.configs import run_config

from dstune.config import trust
from dstune.config.callbacks import check_callbacks, chosen_callbacks
from dstune.config.compose import compose
from dstune.config.convert import dump, load
from dstune.config.run_file import Composed, read_run, write_run
from dstune.core import plugins
from dstune.core.errors import UserError

OWNED = "from pathlib import Path\nPath(__file__).parent.joinpath('owned').touch()\n"


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with modules that leave a trace when they are imported, in front of the import path."""
    (tmp_path / "package").mkdir()
    callback = "from dstune.protocols import Callback\nclass Own(Callback): ...\n"
    for file in ("evil.py", "package/__init__.py", "package/module.py"):
        (tmp_path / file).write_text(OWNED + callback)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


NAMES = ("evil:Own", "evil.Own", "package:Own", "package.module:Own", "package.module.Own", "./evil.py:Own")


@pytest.mark.parametrize("name", NAMES)
def test_a_callback_of_the_working_directory_is_not_imported(hostile: Path, name: str) -> None:
    config = run_config()
    config = replace(config, trainer=replace(config.trainer, callbacks=[name]))
    (problem,) = check_callbacks(config)
    assert problem.where == "trainer.callbacks[0]"
    assert "plugins=[./" in problem.fix
    with pytest.raises(UserError):
        chosen_callbacks(config)
    assert not list(hostile.rglob("owned"))


def test_a_stored_run_imports_none_either(hostile: Path) -> None:
    composed = compose(["data=chitchat", "trainer.callbacks=['evil:Own']"])
    write_run(hostile / "run.yaml", Composed(composed.config, composed.overrides))
    assert [problem.where for problem in check_callbacks(read_run(hostile / "run.yaml").config)]
    assert not (hostile / "owned").exists()


def test_a_module_in_a_package_of_the_working_directory_is_no_plugin(hostile: Path) -> None:
    with pytest.raises(UserError, match="ranks cannot import it: it is not installed"):
        compose(["data=chitchat", "plugins=[package.module]"])
    assert not list(hostile.rglob("owned"))


def test_a_stored_run_names_no_module_of_the_working_directory(hostile: Path) -> None:
    """The list of plugins in a stranger's `run.yaml`: files are its copies, modules are installed."""
    write_run(hostile / "run.yaml", compose(["data=chitchat"]))
    content = load((hostile / "run.yaml").read_text(), "run.yaml")
    for name in ("evil", "package.module"):
        entry = {"name": name, "file": "evil.py", "sha256": "0" * 64, "module": True}
        (hostile / "run.yaml").write_text(dump({**content, "plugins": [entry]}))
        with pytest.raises(UserError):
            read_run(hostile / "run.yaml")
        with (
            trust.from_flags(["--trust", plugins.KEY]),
            pytest.raises(UserError, match=r"no such module|not installed"),
        ):
            read_run(hostile / "run.yaml", [plugins.ACCEPT])
    assert not list(hostile.rglob("owned"))


def test_the_command_finds_no_module_beside_it(hostile: Path) -> None:
    """As installed: the script's folder is on the import path, the working directory is not."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-P", "-m", "dstune", "train", "--cfg", "job", "plugins=[evil]"]
    env = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=hostile, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no such module" in done.stderr
    assert not (hostile / "owned").exists()


@pytest.mark.parametrize("group", ["experiment", "task", "method", "launch"])
def test_no_choice_leaves_the_folder_of_its_group(group: str, tmp_path: Path) -> None:
    """Words of an export or a sweep may come from a stranger: a path would be a configuration that they put somewhere."""
    (tmp_path / "evil.yaml").write_text(
        "# @package _global_\ndefaults: [/task: chat, _self_]\nmodel: {path: a/b, trust_remote_code: true}\n"
    )
    conf = Path(__file__).parents[2] / "conf" / group
    word = f"{group}={os.path.relpath(tmp_path / 'evil', conf)}"
    with pytest.raises(UserError, match=f"there is no such {group}"):
        compose(["data.train=rows.jsonl", word])


def test_a_choice_in_a_folder_of_a_group_stays_one(tmp_path: Path) -> None:
    (tmp_path / "experiment" / "mine").mkdir(parents=True)
    (tmp_path / "experiment" / "mine" / "first.yaml").write_text("# @package _global_\ntrainer: {seed: 9}\n")
    assert compose(["experiment=mine/first", "data.train=rows.jsonl"], [tmp_path]).config.trainer.seed == 9
