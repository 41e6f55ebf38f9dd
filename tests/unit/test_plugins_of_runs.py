"""What a run keeps of its plugins, and which changes of them it accepts."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dstune.config.compose import compose
from dstune.config.run_file import read_run, write_run
from dstune.config.run_overrides import apply_overrides
from dstune.core import plugins
from dstune.core.errors import UserError
from dstune.launch import rundir
from dstune.serve.source import resolve
from dstune.sweep import directory
from tests.support.plugins import ROOT, SIGNUM, copy, folder_of_plugins


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    yield from folder_of_plugins(tmp_path, monkeypatch)


def a_run(path: Path, *overrides: str):
    composed = compose(["data=chitchat", "plugins=[./signum.py]", "optimizer=signum", f"run.dir={path}", *overrides])
    path.mkdir(exist_ok=True)
    write_run(path / "run.yaml", composed)
    return composed


def test_a_run_keeps_its_plugins(folder):
    copy()
    composed = a_run(folder / "run")
    assert (folder / "run" / "plugins" / "signum.py").read_text() == SIGNUM.read_text()
    Path("signum.py").unlink()
    compose(["data=chitchat"])
    again = read_run(folder / "run" / "run.yaml")
    assert (again.config, again.plugins) == (composed.config, composed.plugins)
    assert again.plugins[0].file == "./signum.py"
    assert plugins.digests("optimizer") == [again.plugins[0].sha256]
    assert plugins.digests("task") == []


def test_a_rank_started_process_unpickles_what_a_plugin_defines(folder):
    copy()
    a_run(folder / "run")
    Path("signum.py").unlink()
    config = read_run(folder / "run" / "run.yaml").config.optimizer
    (folder / "pickled").write_bytes(pickle.dumps(config))
    program = "import pickle; print(pickle.load(open('pickled', 'rb')).update_momentum)"
    lookup = "from dstune.protocols import OPTIMIZERS; print('signum' in OPTIMIZERS)"
    for code, stdout in ((program, "0.9\n"), (lookup, "True\n")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert done.stdout == stdout, done.stderr
    compose(["data=chitchat"])
    assert plugins.VARIABLE not in os.environ  # another run's ranks must not inherit it


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", ""])
def test_the_list_of_a_run_names_no_file_elsewhere(folder, name):
    copy()
    a_run(folder / "run")
    file = folder / "run" / "run.yaml"
    file.write_text(file.read_text().replace("name: signum", f"name: '{name}'", 1))
    with pytest.raises(UserError, match="is not a list of plugins"):
        read_run(file)


def test_a_copy_that_was_changed_or_is_gone(folder):
    copy()
    a_run(folder / "run")
    kept = folder / "run" / "plugins" / "signum.py"
    kept.write_text(SIGNUM.read_text() + "# changed\n")
    with pytest.raises(UserError) as error:
        read_run(folder / "run" / "run.yaml")
    (problem,) = error.value.problems
    assert problem.where == str(kept)
    assert "has changed since the run began" in problem.reason
    assert problem.fix == "bring the file back as it was"
    with pytest.raises(UserError, match=plugins.ACCEPT):
        read_run(folder / "run" / "run.yaml", [])
    accepted = read_run(folder / "run" / "run.yaml", [plugins.ACCEPT])
    assert accepted.plugins[0].sha256 != json.loads(json.dumps(plugins.to_dicts(accepted.plugins)))[0]["file"]
    kept.unlink()
    with pytest.raises(UserError, match="there is no such file"):
        read_run(folder / "run" / "run.yaml")


def test_a_task_of_a_plugin_is_served_from_its_run(folder):
    """Its export alone does not have the plugin: there it has to be given, as the refusal says."""
    shutil.copy(SIGNUM.with_name("ordinal.py"), "ordinal.py")
    composed = compose(["data.train=rows.jsonl", "plugins=[./ordinal.py]", "task=ordinal", "run.dir=run"])
    export = folder / "run" / "export"
    export.mkdir(parents=True)
    write_run(folder / "run" / "run.yaml", composed)
    (export / "config.json").write_text("{}")
    (export / "dstune.json").write_text('{"task": {"name": "ordinal"}}')
    Path("ordinal.py").unlink()
    plugins.activate([])

    source = resolve("", "run")
    assert (source.task, source.folder, source.generates) == ("ordinal", export, False)
    assert source.plugins == (str(folder / "run" / "plugins" / "ordinal.py"),)
    with pytest.raises(UserError) as error:
        resolve("", str(export))
    (problem,) = error.value.problems
    assert problem.reason == "was trained for task=ordinal, which is not known here"
    assert problem.fix == "plugins: [FILE.py] in dstune.yaml"


@pytest.fixture
def saved(folder, monkeypatch):
    copy()
    a_run(folder / "run")
    monkeypatch.setattr(rundir.store, "resumable", lambda path: path / "checkpoints" / "step-00000001")
    return folder / "run"


def choose(*overrides: str):
    return rundir.choose(compose(["data=chitchat", "optimizer=signum", "run.dir=run", *overrides]))


def test_the_same_command_again_continues(saved):
    assert choose("plugins=[./signum.py]").plugins[0].name == "signum"


def test_a_changed_plugin_is_refused_unless_it_is_accepted(saved):
    copy("signum.py", "sign momentum", "signed momentum")
    with pytest.raises(UserError) as error:
        choose("plugins=[./signum.py]")
    (problem,) = error.value.problems
    assert problem.where == "./signum.py"
    assert "the plugin signum has changed since the run began" in problem.reason
    accepted = choose("plugins=[./signum.py]", plugins.ACCEPT)
    assert not accepted.config.run.accept_plugin_changes  # by this start, not by every later one
    prepared = rundir.prepare(accepted)
    os.close(prepared.lock)
    assert "signed momentum" in (saved / "plugins" / "signum.py").read_text()
    assert prepared.before.restore() is True
    assert "signed momentum" not in (saved / "plugins" / "signum.py").read_text()


def test_another_plugin_beside_it_is_refused(saved):
    Path("more.py").write_text("")
    with pytest.raises(UserError, match="the run began without the plugin more"):
        choose("plugins=[./signum.py,./more.py]")


def test_the_plugins_of_an_existing_run_are_chosen(saved):
    config = read_run(saved / "run.yaml").config
    with pytest.raises(UserError, match="the plugins of an existing run cannot be changed"):
        apply_overrides(config, ["plugins=[./signum.py]"])


def test_a_sweep_continues_with_its_plugins(folder):
    def sweep(*further: str) -> directory.Sweep:
        words = ["data=chitchat", "plugins=[./signum.py]", "optimizer=signum", *further]
        return directory.Sweep(folder / "sweep", compose(words).config, words, [], [])

    copy()
    (folder / "sweep").mkdir()
    directory.write_sweep(sweep(), ["loss"])
    again = sweep()
    assert directory.continued(again) == (again, False)
    copy("signum.py", "sign momentum", "signed momentum")
    with pytest.raises(UserError, match="the plugin signum has changed since the run began"):
        directory.continued(sweep())
    assert directory.continued(sweep(plugins.ACCEPT))[0].base.optimizer.name == "signum"


def test_a_run_without_plugins_says_nothing_of_them(folder):
    (folder / "run").mkdir()
    write_run(folder / "run" / "run.yaml", compose(["data=chitchat"]))
    assert "plugins" not in (folder / "run" / "run.yaml").read_text()
