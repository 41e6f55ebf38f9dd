"""Plugins: found, loaded, recorded, refused; all in one process and without training."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from dstune.config import plugins as requests
from dstune.config.completion import complete
from dstune.config.compose import compose
from dstune.config.documentation import documentation, help_text
from dstune.config.run_file import read_run, write_run
from dstune.config.run_overrides import apply_overrides
from dstune.config.schema import CHOICES
from dstune.config.validate import find_problems
from dstune.core import plugins
from dstune.core.errors import UserError
from dstune.launch import rundir
from dstune.protocols import OPTIMIZERS
from dstune.sweep import directory

ROOT = Path(__file__).parents[2]
LION = ROOT / "examples" / "plugins" / "lion.py"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    yield tmp_path
    plugins.activate([])
    assert "lion" not in OPTIMIZERS
    assert "optimizer=lion" not in {setting.group for setting in documentation()}


def copy(target: str = "lion.py", old: str = "", new: str = "") -> Path:
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text(LION.read_text().replace(old, new) if old else LION.read_text())
    return Path(target)


def problems(*overrides: str) -> list[tuple[str, str, str]]:
    with pytest.raises(UserError) as error:
        compose(["data=chitchat", *overrides])
    return [(problem.where, problem.reason, problem.fix) for problem in error.value.problems]


# ---- where plugins are named ----


def test_three_places_add_up(folder):
    copy("a/lion.py")
    Path("one.py").write_text("")
    Path("two.py").write_text("")
    Path("dstune.yaml").write_text("plugins: [./one.py]\n")
    Path("mine/experiment").mkdir(parents=True)
    text = "# @package _global_\nplugins: [./two.py]\ndefaults:\n  - override /optimizer: lion\n  - override /data: chitchat\n"
    Path("mine/experiment/own.yaml").write_text(text)
    composed = compose(["experiment=own", "plugins=[./one.py,a/lion.py]"], ["mine"])
    assert [plugin.name for plugin in composed.plugins] == ["one", "two", "lion"]
    assert composed.plugins[2].registers == ("optimizer lion",)
    assert composed.config.optimizer.name == "lion"


@pytest.mark.parametrize(
    ("content", "where", "reason"),
    [
        ("plugin: [a.py]", "dstune.yaml: plugin", "the file of a project has no such key"),
        ("plugins: {a: b}", "dstune.yaml: plugins", "expected a list of files and modules"),
        ("plugins: [a", "dstune.yaml:1", "this is no YAML"),
    ],
)
def test_a_project_file_that_is_wrong(content, where, reason):
    Path("dstune.yaml").write_text(content)
    ((found, message, _),) = problems()
    assert found == where
    assert message.startswith(reason)


# ---- loading ----


def test_a_choice_with_the_defaults_of_the_class():
    copy()
    composed = compose(["data=chitchat", "plugins=[./lion.py]", "optimizer=lion", "optimizer.update_momentum=0.8"])
    assert (composed.config.optimizer.update_momentum, composed.config.optimizer.momentum) == (0.8, 0.99)
    assert composed.overrides[1] == "plugins=[./lion.py]"
    assert "lion" in CHOICES["optimizer"]


def test_keys_have_types_ranges_and_nearest_names():
    copy()
    lion = ["plugins=[./lion.py]", "optimizer=lion"]
    ((where, _, fix),) = problems(*lion, "optimizer.update_momentun=0.8")
    assert (where, fix) == ("optimizer.update_momentun", "did you mean optimizer.update_momentum=0.8?")
    ((where, reason, _),) = problems(*lion, "optimizer.momentum=much")
    assert (where, reason) == ("optimizer.momentum", "expected a number")
    config = compose(["data=chitchat", *lion, "optimizer.momentum=0.5"]).config
    assert [problem.where for problem in find_problems(config)] == ["optimizer.momentum"]  # of its own check
    config = compose(["data=chitchat", *lion, "optimizer.momentum=2"]).config
    assert [problem.where for problem in find_problems(config)] == ["optimizer.momentum"]  # of its range


TRACKER = """
from dataclasses import dataclass
import dstune

@dataclass(frozen=True)
class TableConfig:
    separator: str | None = None
    \"\"\"Between columns.\"\"\"

@dstune.tracker
class Table(dstune.Tracker):
    Config = TableConfig
    name = "table"

@dstune.tracker
class Bell(dstune.Tracker):
    name = "bell"
    switch = "Ring at the end."
"""


def test_the_keys_of_a_tracker(folder):
    Path("table.py").write_text(TRACKER)
    plugin, off = "plugins=[./table.py]", compose(["data=chitchat"]).config.tracking
    config = compose(["data=chitchat", plugin, "tracking.table.separator=x", "tracking.bell=true"]).config
    assert (config.tracking.table.separator, config.tracking.bell) == ("x", True)
    assert pickle.loads(pickle.dumps(config)) == config
    ((where, _, fix),) = problems(plugin, "tracking.table.seperator=x")
    assert (where, fix) == ("tracking.table.seperator", "did you mean tracking.table.separator=x?")
    compose(["data=chitchat", plugin])
    text = " ".join(help_text({}).split())
    assert "tracking.table.separator=null Between columns. tracking.bell=false Ring at the end." in text
    ((where, *_),) = problems("tracking.bell=true")
    assert where == "tracking.bell"
    assert compose(["data=chitchat"]).config.tracking == off


def test_help_and_its_absence():
    copy()
    compose(["data=chitchat", "plugins=[./lion.py]"])
    text = help_text({"optimizer": ["adamw", "lion"]})
    assert "optimizer.update_momentum=0.9 [optimizer=lion]" in text
    assert "beta 1 of the paper" in text
    assert "plugins=[]" in text
    compose(["data=chitchat"])
    assert "update_momentum" not in help_text({})


def test_help_needs_the_file_no_more():
    copy()
    compose(["data=chitchat", "plugins=[./lion.py]"])
    Path("lion.py").write_text("")
    assert "beta 1 of the paper" in help_text({"optimizer": ["adamw", "lion"]})
    Path("lion.py").unlink()
    documentation.cache_clear()
    assert "beta 1 of the paper" in help_text({"optimizer": ["adamw", "lion"]})


def test_completion_loads_no_file():
    copy()
    Path("lion.py").write_text("raise SystemExit('completion has run a file')")
    found = complete("dstune train plugins=[./lion.py] optimizer=", {"train": lambda given: Behind})
    assert found == ["optimizer=adamw", "optimizer=sgd"]


class Behind:
    words = ()
    overrides = True
    files = False


def test_the_same_file_is_executed_once_and_a_changed_one_again():
    copy()
    Path("lion.py").write_text(
        LION.read_text() + "\nimport builtins\nbuiltins.runs = getattr(builtins, 'runs', 0) + 1\n"
    )
    import builtins

    first = compose(["data=chitchat", "plugins=[./lion.py]", "optimizer=lion"]).config.optimizer
    compose(["data=chitchat"])
    again = compose(["data=chitchat", "plugins=[./lion.py]", "optimizer=lion"]).config.optimizer
    assert builtins.runs == 1
    assert type(first) is type(again)
    Path("lion.py").write_text(Path("lion.py").read_text().replace("= setting(0.9,", "= setting(0.95,"))
    changed = compose(["data=chitchat", "plugins=[./lion.py]", "optimizer=lion"]).config.optimizer
    assert (first.update_momentum, changed.update_momentum, builtins.runs) == (0.9, 0.95, 2)
    del builtins.runs


@pytest.mark.parametrize(
    ("content", "where", "reason", "fix"),
    [
        ("x = 1\nx = = 2\n", "bad.py:2", "this is no Python", "correct the line"),
        ("import os\n\nimport nonesuch\n", "bad.py:3", "ModuleNotFoundError", "install nonesuch"),
        ("import sys\nsys.exit(0)\n", "bad.py:2", "SystemExit: 0", "correct the line"),
        ("def f():\n    return 1 / 0\n\nf()\n", "bad.py:2", "ZeroDivisionError", "correct the line"),
        (
            "import dstune\n\n@dstune.task\nclass T(dstune.Task):\n    name = ''\n",
            "bad.py:3",
            "a task needs a `name`",
            "",
        ),
    ],
)
def test_a_file_that_cannot_be_imported(content, where, reason, fix):
    Path("bad.py").write_text(content)
    ((found, message, advice),) = problems("plugins=[./bad.py]")
    assert found == f"./{where}"
    assert reason in message
    assert fix in advice
    assert "dstune_plugins.bad" not in sys.modules


def test_what_a_broken_file_had_registered_is_gone():
    copy()
    Path("lion.py").write_text(LION.read_text() + "\nraise RuntimeError('too late')\n")
    ((where, _, _),) = problems("plugins=[./lion.py]", "optimizer=lion")
    assert where.startswith("./lion.py:")


def test_names_that_clash():
    copy("a/lion.py")
    copy("b/lion.py", "Share", "share")
    ((_, reason, _),) = problems("plugins=[a/lion.py,b/lion.py]")
    assert reason == "there are two plugins named lion: a/lion.py and b/lion.py"
    copy("other.py")
    ((_, reason, _),) = problems("plugins=[a/lion.py,./other.py]")
    assert "there are two optimizers named 'lion'" in reason
    copy("mine.py", 'name: str = "lion"', 'name: str = "adamw"')
    ((where, reason, _),) = problems("plugins=[./mine.py]")
    assert where.startswith("./mine.py:")
    assert "there are two optimizers named 'adamw'" in reason


def test_names_that_clash_with_a_plugin_of_an_earlier_configuration():
    copy()
    copy("other.py")
    for name in ("lion", "other"):
        compose(["data=chitchat", f"plugins=[./{name}.py]", "optimizer=lion"])
    ((where, reason, _),) = problems("plugins=[./lion.py,./other.py]")
    assert where == "./other.py"  # as without the earlier ones
    assert "there are two optimizers named 'lion'" in reason


@pytest.mark.parametrize(
    ("value", "reason", "fix"),
    [
        ("[./lions.py]", "there is no such file", "did you mean lion.py?"),
        ("[nonesuch.module]", "there is no such module", "plugins=[./file.py]"),
        ("[./my-lion.py]", "the name of a plugin file is a name in Python", "my_lion.py"),
        ("[./lion.py:Tiger]", "./lion.py registers no class Tiger", "the plugin registers Lion"),
        ("3", "expected a list of files and modules", "plugins=[./file.py,package.module]"),
    ],
)
def test_plugins_that_are_none(value, reason, fix):
    copy()
    copy("my-lion.py")
    ((where, message, advice),) = problems(f"plugins={value}")
    assert (where, message) == ("plugins", reason)
    assert fix in advice


def test_a_module_beside_the_program_travels_as_a_file(monkeypatch, folder):
    copy()
    monkeypatch.syspath_prepend(str(folder))
    (plugin,) = compose(["data=chitchat", "plugins=[lion:Lion]"]).plugins
    assert plugin.is_file
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").write_text("")
    copy("package/lion.py")
    ((_, reason, fix),) = problems("plugins=[package.lion]")
    assert reason == "ranks cannot import it: it is not installed"
    assert "plugins=[package/lion.py]" in fix


def test_a_module_that_ranks_can_import_is_imported_by_name(monkeypatch, folder):
    (folder / "shelf").mkdir()
    (folder / "shelf" / "__init__.py").write_text("")
    copy("shelf/lion.py")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")
    monkeypatch.syspath_prepend(str(folder))
    (plugin,) = compose(["data=chitchat", "plugins=[shelf.lion]"]).plugins
    assert (plugin.name, plugin.is_file, plugin.registers) == ("shelf.lion", False, ("optimizer lion",))


# ---- installed packages ----


def install(folder: Path, version: str, old: str = "", new: str = "") -> None:
    """`mylion`, an installed package with an entry point."""
    site = folder / "site"
    shutil.rmtree(site, ignore_errors=True)
    copy(str(site / "mylion" / "__init__.py"), old, new)
    info = site / f"mylion-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mylion\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("[dstune.plugins]\nlion = mylion\n")


def in_a_process(folder: Path, program: str) -> str:
    """What `program` prints where `install` is in effect, in a process of its own: packages are looked for once."""
    env = os.environ | {"PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}"}
    imports = "from dstune.config.compose import compose\nfrom dstune.config.run_file import read_run, write_run\n"
    start = imports + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_installed_package_is_there_always(folder):
    install(folder, "1.0")
    program = """
        from dstune.config.completion import complete
        from types import SimpleNamespace as N
        print(complete("dstune train optimizer=l", {"train": lambda given: N(words=[], overrides=True, files=False)}))
        compose(["data=chitchat", "plugins=[mylion]", "optimizer=lion"])
        from pathlib import Path
        from dstune.core import plugins
        (installed,) = plugins.used_by(compose(["data=chitchat", "optimizer=lion"]).config)
        before = plugins.Plugin("mylion", installed.file, installed.sha256, is_file=False)  # when it had no entry point
        plugins.activate_stored([before], Path("."))
        print(compose(["data=chitchat", "optimizer=lion"]).config.optimizer.name)
        """
    assert in_a_process(folder, program) == "['optimizer=lion']\nlion\n"


def test_the_examples_appear_in_help_and_completion(folder):
    install(folder, "1.0")
    examples = sorted((ROOT / "examples" / "plugins").glob("*.py"))
    (folder / "site" / "mylion" / "__init__.py").write_text("")
    for file in examples:
        shutil.copy(file, folder / "site" / "mylion")
    points = "".join(f"{file.stem} = mylion.{file.stem}\n" for file in examples)
    (folder / "site" / "mylion-1.0.dist-info" / "entry_points.txt").write_text(f"[dstune.plugins]\n{points}")
    words = ("task=or", "method=bitf", "optimizer=li", "data.format=star", "trainer.callbacks=[ve")
    words = (*words, "trainer.early_stopping.metric=ka")
    program = f"""
        import json
        from dstune.config.completion import complete
        from types import SimpleNamespace as N
        verbs = {{"train": lambda given: N(words=[], overrides=True, files=False)}}
        print(json.dumps([complete("dstune train " + word, verbs) for word in {words}]))
        print(complete("dstune train task=ordinal task.smo", verbs))
        from dstune.cli import main
        main(["train", "--help"])
        """
    completed, keys, *text = in_a_process(folder, program).split("\n")
    assert json.loads(completed) == [
        *(["task=ordinal"], ["method=bitfit"], ["optimizer=lion"], ["data.format=star_rating"]),
        *(["trainer.callbacks=[veto_outliers]"], ["trainer.early_stopping.metric=kappa"]),
    ]
    assert keys == "['task.smoothing=']"
    words = " ".join(" ".join(text).split())
    assert all(name in words for name in ("[task=ordinal]", "[method=bitfit]", "[optimizer=lion]", "star_rating"))
    assert all(name in words for name in ("there are: veto_outliers", "kappa"))


def test_a_run_lists_the_installed_plugins_that_can_act_in_it(folder):
    install(folder, "1.0")
    program = """
        from pathlib import Path
        for name in ("adamw", "lion"):
            Path(name).mkdir()
            write_run(Path(name, "run.yaml"), compose(["data=chitchat", f"optimizer={name}"]))
        read_run(Path("lion", "run.yaml"))
        from dstune.core.plugins import digests
        print(len(digests("optimizer")))
        """
    assert in_a_process(folder, program) == "1\n"
    assert "plugins" not in (folder / "adamw" / "run.yaml").read_text()
    assert not (folder / "lion" / "plugins").exists()
    (listed,) = yaml.safe_load((folder / "lion" / "run.yaml").read_text())["plugins"]
    assert listed == {
        "name": "mylion",
        "file": str(folder / "site" / "mylion" / "__init__.py"),
        "module": True,
        "distribution": "mylion",
        "version": "1.0",
        "registers": ["optimizer lion"],
        "sha256": hashlib.sha256(LION.read_bytes()).hexdigest(),
    }

    # What continuing it says: with the same package, another version, none, and a further one.
    program = """
        from pathlib import Path
        from dstune.core.errors import UserError
        from dstune.launch import rundir, train
        rundir.store.resumable = lambda path: path / "checkpoints" / "step-00000001"
        def attempt(*command):
            try:
                if command[0] == "RUN":
                    found = train.configuration(train.parse([name, *command[1:]]))
                else:
                    found = rundir.choose(compose(["data=chitchat", f"optimizer={name}", f"run.dir={name}", *command[1:]]))
            except UserError as error:
                print(error.problems[0].reason, "|", error.problems[0].fix)
            else:
                print("continues", [one.version for one in found.plugins])
        accept = "run.accept_plugin_changes=true"
        name = "lion"
        for command in (("RUN",), ("RUN", accept), ("NEW",), ("NEW", accept)):
            attempt(*command)
        name = "adamw"
        attempt("RUN")
        attempt("NEW")
        """
    assert in_a_process(folder, program).splitlines() == ["continues ['1.0']"] * 4 + ["continues []"] * 2
    install(folder, "1.1", "sign momentum", "signed momentum")
    lines = in_a_process(folder, program).splitlines()
    for number in (0, 2):
        assert "the run began with the plugin mylion of the package mylion 1.0 (sha256 " in lines[number]
        assert "and 1.1 (sha256 " in lines[number]
        assert "| pip install mylion==1.0, or run.accept_plugin_changes=true" in lines[number]
    assert [lines[1], lines[3]] == ["continues ['1.1']"] * 2
    metric = "\n\n@dstune.metric\nclass Half(dstune.Metric):\n    name = 'half'\n    tasks = ('classification',)\n"
    install(folder, "1.0", "import dstune\n", f"import dstune\n{metric}\n")
    lines = in_a_process(folder, program).splitlines()
    for number in (4, 5):
        assert (
            "the run began without the plugin mylion of the package mylion 1.0 | pip uninstall mylion" in lines[number]
        )
    shutil.rmtree(folder / "site")
    lines = in_a_process(folder, program.replace('("NEW",), ("NEW", accept)', ""))
    assert "the plugin mylion of the package mylion 1.0, which is not installed | pip install mylion==1.0" in lines


def test_a_plugin_says_for_which_version_it_was_written():
    Path("old.py").write_text("DSTUNE_PROTOCOLS = 0\n")
    ((where, reason, fix),) = problems("plugins=[./old.py]")
    assert (where, reason) == ("./old.py", "it was written for version 0 of the protocols, and this is version 1")
    assert "DSTUNE_PROTOCOLS = 1" in fix
    Path("old.py").write_text("DSTUNE_PROTOCOLS = 1\n")
    compose(["data=chitchat", "plugins=[./old.py]"])


def test_a_member_needs_a_config_of_its_own():
    text = "import dstune\nfrom dstune.optim.adamw import AdamW\n\n@dstune.optimizer\nclass Mine(AdamW):\n    name = 'mine'\n"
    Path("mine.py").write_text(text)
    ((where, reason, _),) = problems("plugins=[./mine.py]")
    assert where == "./mine.py:4"
    assert "Mine: the optimizer 'adamw' has this `Config`" in reason
    assert compose(["data=chitchat"]).config.optimizer.name == "adamw"


def test_an_installed_package_with_the_name_of_a_built_in_is_the_one_to_be_refused(folder):
    install(folder, "1.0", 'name: str = "lion"', 'name: str = "adamw"')
    text = in_a_process(
        folder,
        """
        from dstune.core.errors import UserError
        from dstune.protocols import CALLBACKS, OPTIMIZERS
        for kind in (CALLBACKS, OPTIMIZERS):
            try:
                list(kind)
                compose(["data=chitchat"])
            except UserError as error:
                print(error)
        print(OPTIMIZERS["adamw"].__module__)
        """,
    )
    assert text.count("the plugin of the installed package mylion: the plugin cannot be imported") == 2
    assert "there are two optimizers named 'adamw'" in text
    assert text.endswith("dstune.optim.adamw\n")


# ---- runs ----


def a_run(path: Path, *overrides: str):
    composed = compose(["data=chitchat", "plugins=[./lion.py]", "optimizer=lion", f"run.dir={path}", *overrides])
    path.mkdir(exist_ok=True)
    write_run(path / "run.yaml", composed)
    return composed


def test_a_run_keeps_its_plugins(folder):
    copy()
    composed = a_run(folder / "run")
    assert (folder / "run" / "plugins" / "lion.py").read_text() == LION.read_text()
    Path("lion.py").unlink()
    compose(["data=chitchat"])
    again = read_run(folder / "run" / "run.yaml")
    assert (again.config, again.plugins) == (composed.config, composed.plugins)
    assert again.plugins[0].file == "./lion.py"
    assert plugins.digests("optimizer") == [again.plugins[0].sha256]
    assert plugins.digests("task") == []


def test_a_rank_started_process_unpickles_what_a_plugin_defines(folder):
    copy()
    a_run(folder / "run")
    Path("lion.py").unlink()
    config = read_run(folder / "run" / "run.yaml").config.optimizer
    (folder / "pickled").write_bytes(pickle.dumps(config))
    program = "import pickle; print(pickle.load(open('pickled', 'rb')).update_momentum)"
    lookup = "from dstune.protocols import OPTIMIZERS; print('lion' in OPTIMIZERS)"
    for text, formatted in ((program, "0.9\n"), (lookup, "True\n")):
        done = subprocess.run(
            [sys.executable, "-c", text], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert done.stdout == formatted, done.stderr
    compose(["data=chitchat"])
    assert plugins.VARIABLE not in os.environ  # another run's ranks must not inherit it


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", ""])
def test_the_list_of_a_run_names_no_file_elsewhere(folder, name):
    copy()
    a_run(folder / "run")
    file = folder / "run" / "run.yaml"
    file.write_text(file.read_text().replace("name: lion", f"name: '{name}'", 1))
    with pytest.raises(UserError, match="is not a list of plugins"):
        read_run(file)


def test_a_copy_that_was_changed_or_is_gone(folder):
    copy()
    a_run(folder / "run")
    kept = folder / "run" / "plugins" / "lion.py"
    kept.write_text(LION.read_text() + "# changed\n")
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


@pytest.fixture
def saved(folder, monkeypatch):
    copy()
    a_run(folder / "run")
    monkeypatch.setattr(rundir.store, "resumable", lambda path: path / "checkpoints" / "step-00000001")
    return folder / "run"


def choose(*overrides: str):
    return rundir.choose(compose(["data=chitchat", "optimizer=lion", "run.dir=run", *overrides]))


def test_the_same_command_again_continues(saved):
    assert choose("plugins=[./lion.py]").plugins[0].name == "lion"


def test_a_changed_plugin_is_refused_unless_it_is_accepted(saved):
    copy("lion.py", "sign momentum", "signed momentum")
    with pytest.raises(UserError) as error:
        choose("plugins=[./lion.py]")
    (problem,) = error.value.problems
    assert problem.where == "./lion.py"
    assert "the plugin lion has changed since the run began" in problem.reason
    accepted = choose("plugins=[./lion.py]", plugins.ACCEPT)
    assert not accepted.config.run.accept_plugin_changes  # by this start, not by every later one
    prepared = rundir.prepare(accepted)
    os.close(prepared.lock)
    assert "signed momentum" in (saved / "plugins" / "lion.py").read_text()
    assert prepared.before.restore() is True
    assert "signed momentum" not in (saved / "plugins" / "lion.py").read_text()


def test_another_plugin_beside_it_is_refused(saved):
    Path("more.py").write_text("")
    with pytest.raises(UserError, match="the run began without the plugin more"):
        choose("plugins=[./lion.py,./more.py]")


def test_the_plugins_of_an_existing_run_are_chosen(saved):
    config = read_run(saved / "run.yaml").config
    with pytest.raises(UserError, match="the plugins of an existing run are settled"):
        apply_overrides(config, ["plugins=[./lion.py]"])


def test_a_sweep_continues_with_its_plugins(folder):
    def sweep(*further: str) -> directory.Sweep:
        words = ["data=chitchat", "plugins=[./lion.py]", "optimizer=lion", *further]
        return directory.Sweep(folder / "sweep", compose(words).config, words, [], [])

    copy()
    (folder / "sweep").mkdir()
    directory.write_sweep(sweep(), ["loss"])
    again = sweep()
    assert directory.continued(again) == (again, False)
    copy("lion.py", "sign momentum", "signed momentum")
    with pytest.raises(UserError, match="the plugin lion has changed since the run began"):
        directory.continued(sweep())
    assert directory.continued(sweep(plugins.ACCEPT))[0].base.optimizer.name == "lion"


def test_a_run_without_plugins_says_nothing_of_them(folder):
    (folder / "run").mkdir()
    write_run(folder / "run" / "run.yaml", compose(["data=chitchat"]))
    assert "plugins" not in (folder / "run" / "run.yaml").read_text()
    assert requests.requested([]) == []
