"""Plugins of installed packages: always there, listed by the runs in which they act."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import yaml

from tests.support.plugins import ROOT, SIGNUM, folder_of_plugins, in_a_process, install


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    yield from folder_of_plugins(tmp_path, monkeypatch)


def test_an_installed_package_is_there_always(folder):
    install(folder, "1.0")
    program = """
        from dstune.config.completion import complete
        from types import SimpleNamespace as N
        print(complete("dstune train optimizer=si", {"train": lambda given: N(words=[], overrides=True, files=False)}))
        compose(["data=chitchat", "plugins=[mysignum]", "optimizer=signum"])
        from pathlib import Path
        from dstune.core import plugins
        (installed,) = plugins.used_by(compose(["data=chitchat", "optimizer=signum"]).config)
        before = plugins.Plugin("mysignum", installed.file, installed.sha256, is_file=False)  # when it had no entry point
        plugins.activate_stored([before], Path("."))
        print(compose(["data=chitchat", "optimizer=signum"]).config.optimizer.name)
        """
    assert in_a_process(folder, program) == "['optimizer=signum']\nsignum\n"


def test_the_examples_appear_in_help_and_completion(folder):
    install(folder, "1.0")
    examples = sorted((ROOT / "examples" / "plugins").glob("*.py"))
    (folder / "site" / "mysignum" / "__init__.py").write_text("")
    for file in examples:
        shutil.copy(file, folder / "site" / "mysignum")
    points = "".join(f"{file.stem} = mysignum.{file.stem}\n" for file in examples)
    (folder / "site" / "mysignum-1.0.dist-info" / "entry_points.txt").write_text(f"[dstune.plugins]\n{points}")
    words = ("task=or", "method=bitf", "optimizer=sig", "data.format=star", "trainer.callbacks=[ve")
    words = (*words, "trainer.early_stopping.metric=ka")
    program = f"""
        import json
        from dstune.config.completion import complete
        from types import SimpleNamespace as N
        verbs = {{"train": lambda given: N(words=[], overrides=True, files=False)}}
        print(json.dumps([complete("dstune train " + word, verbs) for word in {words}]))
        print(complete("dstune train task=ordinal task.smo", verbs))
        from dstune.cli import main
        main(["train", "--help", "all"])
        """
    completed, keys, *text = in_a_process(folder, program).split("\n")
    assert json.loads(completed) == [
        *(["task=ordinal"], ["method=bitfit"], ["optimizer=signum"], ["data.format=star_rating"]),
        *(["trainer.callbacks=[veto_outliers]"], ["trainer.early_stopping.metric=kappa"]),
    ]
    assert keys == "['task.smoothing=']"
    words = " ".join(" ".join(text).split())
    assert all(name in words for name in ("[task=ordinal]", "[method=bitfit]", "[optimizer=signum]", "star_rating"))
    assert all(name in words for name in ("there are: veto_outliers", "kappa"))


@pytest.mark.ci
def test_a_run_lists_the_installed_plugins_that_can_act_in_it(folder):
    install(folder, "1.0")
    program = """
        from pathlib import Path
        for name in ("adamw", "signum"):
            Path(name).mkdir()
            write_run(Path(name, "run.yaml"), compose(["data=chitchat", f"optimizer={name}"]))
        read_run(Path("signum", "run.yaml"))
        from dstune.core.plugins import digests
        print(len(digests("optimizer")))
        """
    assert in_a_process(folder, program) == "1\n"
    assert "plugins" not in (folder / "adamw" / "run.yaml").read_text()
    assert not (folder / "signum" / "plugins").exists()
    (listed,) = yaml.safe_load((folder / "signum" / "run.yaml").read_text())["plugins"]
    assert listed == {
        "name": "mysignum",
        "file": str(folder / "site" / "mysignum" / "__init__.py"),
        "module": True,
        "distribution": "mysignum",
        "version": "1.0",
        "registers": ["optimizer signum"],
        "sha256": hashlib.sha256(SIGNUM.read_bytes()).hexdigest(),
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
        name = "signum"
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
        assert "the run began with the plugin mysignum of the package mysignum 1.0 (sha256 " in lines[number]
        assert "and 1.1 (sha256 " in lines[number]
        assert "| pip install mysignum==1.0, or run.accept_plugin_changes=true" in lines[number]
    assert [lines[1], lines[3]] == ["continues ['1.1']"] * 2
    metric = "\n\n@dstune.metric\nclass Half(dstune.Metric):\n    name = 'half'\n    tasks = ('classification',)\n"
    install(folder, "1.0", "import dstune\n", f"import dstune\n{metric}\n")
    lines = in_a_process(folder, program).splitlines()
    for number in (4, 5):
        assert (
            "the run began without the plugin mysignum of the package mysignum 1.0 | pip uninstall mysignum"
            in lines[number]
        )
    shutil.rmtree(folder / "site")
    lines = in_a_process(folder, program.replace('("NEW",), ("NEW", accept)', ""))
    assert (
        "the plugin mysignum of the package mysignum 1.0, which is not installed | pip install mysignum==1.0" in lines
    )


def test_an_installed_package_with_the_name_of_a_built_in_is_the_one_to_be_refused(folder):
    install(folder, "1.0", 'name: str = "signum"', 'name: str = "adamw"')
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
        print(OPTIMIZERS.without_installed()["adamw"].__module__)
        """,
    )
    assert text.count("the plugin of the installed package mysignum: the plugin cannot be imported") == 2
    assert "there are two optimizers named 'adamw'" in text
    assert text.endswith("dstune.optim.adamw\n")
