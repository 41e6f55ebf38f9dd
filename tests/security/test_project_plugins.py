"""A folder's `dstune.yaml` names plugins: they run only after the user has trusted them, and only as they were then."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import sys
from pathlib import Path

import pytest
from support.configs import run_config
from support.tiny import save_decoder

import dstune
from dstune.cli import main
from dstune.config import project
from dstune.config.compose import compose
from dstune.config.run_overrides import apply_overrides
from dstune.core import plugins
from dstune.core.errors import UserError

EVIL = "from pathlib import Path\nPath({marker!r}).touch()\n"
ROWS = '{"text": "w1 w2 w3"}\n' * 40


class Folder:
    """A stranger's folder in which the user stands, with a plugin that leaves a marker where it runs."""

    def __init__(self, path: Path):
        self.path, self.marker = path, path.parent / "marker"
        path.mkdir()
        self.write("evil.py")
        (path / "dstune.yaml").write_text("plugins: [./evil.py]\n")

    def write(self, name: str, more: str = "") -> Path:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(EVIL.format(marker=str(self.marker)) + more)
        return file

    def has_run(self) -> bool:
        """Whether the plugin has run since the last question."""
        ran = self.marker.exists()
        self.marker.unlink(missing_ok=True)
        return ran


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    found = Folder(tmp_path / "theirs")
    monkeypatch.chdir(found.path)
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # no terminal
    forget()
    yield found
    plugins.activate([])


def forget() -> None:
    """Of plugins that an earlier test has executed in this process."""
    plugins.activate([])
    plugins._loaded.pop("evil", None)


def show(*words: str) -> int:
    forget()
    return main(["train", *words, "--cfg", "job"])


# ---- verbs ----

REFUSED = (
    ["train", "data.train=absent.jsonl"],
    ["train", "--cfg", "job"],
    ["train", "--info", "config"],
    ["train", "--multirun", "trainer.seed=1,2", "data.train=absent.jsonl"],
    ["plan", "hardware=8xH100"],
    ["data", "show", "data.train=absent.jsonl"],
    ["predict", "model", "--text", "w1"],
    ["evaluate", "model"],
    ["evaluate", "model", "data.test=absent.jsonl"],
    ["serve", "."],
)
IGNORED = (
    ["train", "--help"],
    ["train", "--hydra-help"],
    ["doctor"],
    ["models", "hardware=8xH100"],
    ["import", "axolotl.yaml"],
)


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_no_verb_runs_what_the_folder_names(folder: Folder, words: list[str], capsys: pytest.CaptureFixture) -> None:
    save_decoder(folder.path / "model")
    code = main(words)
    assert not folder.has_run()
    assert code == 2
    told = capsys.readouterr().err
    assert "./evil.py" in told and "dstune trust ." in told and "--trust plugins" in told


@pytest.mark.parametrize("words", IGNORED, ids=" ".join)
def test_verbs_that_need_no_plugins_go_on_without(
    folder: Folder, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (folder.path / "axolotl.yaml").write_text("base_model: a/b\ndatasets: [{path: x.jsonl, type: alpaca}]\n")
    (folder.path / "x.jsonl").write_text(ROWS)
    monkeypatch.setattr("dstune.launch.doctor._checks", lambda config, arguments: [])
    assert main(words) == 0
    assert not folder.has_run()
    notes = [line for line in capsys.readouterr().err.splitlines() if "./evil.py" in line]
    assert len(notes) == 1 and "dstune trust ." in notes[0]


def test_a_broken_file_keeps_nobody_from_help(folder: Folder, capsys: pytest.CaptureFixture) -> None:
    (folder.path / "dstune.yaml").write_text("plugins: [")
    assert main(["train", "--help"]) == 0
    assert "dstune.yaml:1" in capsys.readouterr().err


def test_python_runs_none_either(folder: Folder) -> None:
    with pytest.raises(UserError):
        dstune.train("data.train=absent.jsonl", progress=False)
    assert not folder.has_run()


def test_a_run_that_is_continued_keeps_its_own(folder: Folder) -> None:
    main(["trust", "--yes"])
    Path("mine.py").touch()
    plugins.activate(["./mine.py"])
    with pytest.raises(UserError):
        apply_overrides(run_config(), ["zero=stage3"])  # composes, to say what the choice would set
    assert not folder.has_run()
    assert [plugin.name for plugin in plugins.active()] == ["mine"]


# ---- trust ----


def test_trusted_plugins_run(folder: Folder) -> None:
    assert main(["trust", ".", "--yes"]) == 0
    assert not folder.has_run()  # to trust is not to run
    assert show() == 0
    assert folder.has_run()
    assert main(["trust", "--remove", "."]) == 0
    assert show() == 2
    assert not folder.has_run()
    assert main(["trust", "--remove", "."]) == 2


def test_what_the_command_names_runs(folder: Folder) -> None:
    assert show("plugins=[./evil.py]") == 0
    assert folder.has_run()
    assert show("plugins=[evil.py]") == 0  # another spelling
    assert folder.has_run()
    folder.write("second.py")
    assert show("plugins=[./second.py]") == 2
    assert not folder.has_run()


def test_the_flag_counts_for_one_command(folder: Folder) -> None:
    assert show("--trust", "plugins") == 0
    assert folder.has_run()
    assert show("--trust", "launch.setup") == 2
    assert show() == 2
    assert not folder.has_run()


def test_a_changed_or_added_plugin_is_not_trusted(folder: Folder, capsys: pytest.CaptureFixture) -> None:
    folder.write("second.py")
    (folder.path / "dstune.yaml").write_text("plugins: [./evil.py, ./second.py]\n")
    main(["trust", ".", "--yes"])
    folder.write("second.py", "changed = True\n")
    assert show() == 2
    told = capsys.readouterr().err
    assert "./second.py" in told and "./evil.py" not in told
    assert not folder.has_run()
    main(["trust", ".", "--yes"])
    folder.write("third.py")
    (folder.path / "dstune.yaml").write_text("plugins: [./evil.py, ./second.py, ./third.py]\n")
    assert show() == 2
    told = capsys.readouterr().err
    assert "./third.py" in told and "./second.py" not in told
    (folder.path / "dstune.yaml").write_text("# shorter\nplugins: [./second.py]\n")
    assert show() == 0


def test_trust_is_of_one_folder(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["trust", ".", "--yes"])
    (tmp_path / "link").symlink_to(folder.path)
    monkeypatch.chdir(tmp_path / "link")
    assert show() == 0
    folder.has_run()
    os.rename(folder.path, tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert show() == 2
    assert not folder.has_run()


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("yes\n", 0), ("n\n", 1), ("\n", 1), ("", 1)])
def test_a_terminal_is_asked_once(
    folder: Folder, answer: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert main(["trust", "."]) == code
    assert plugins.plugin_files.find("./evil.py").sha256 in capsys.readouterr().out
    assert show() == (0 if code == 0 else 2)
    assert main(["trust"]) == (0 if code == 0 else 1)  # which does not ask again what is trusted


def test_without_a_terminal_nothing_is_trusted(folder: Folder, capsys: pytest.CaptureFixture) -> None:
    assert main(["trust", "."]) == 2
    assert "--yes" in capsys.readouterr().err
    assert project.read_record(folder.path) is None


def test_the_list_of_trusted_folders(folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["trust", "--list"]) == 0
    assert capsys.readouterr().out == ""
    main(["trust", ".", "--yes"])
    capsys.readouterr()
    main(["trust", "--list"])
    assert str(folder.path) in capsys.readouterr().out.splitlines()
    for words in (["trust", str(tmp_path)], ["trust", "nowhere"]):
        assert main(words) == 2


# ---- files ----


def test_the_bytes_that_were_checked_are_executed(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    harmless, checked = folder.path / "evil.py", project._source
    harmless.write_text("x = 1\n")
    main(["trust", ".", "--yes"])

    def replaced_behind_the_check(*arguments):
        source = checked(*arguments)
        folder.write("evil.py")
        return source

    monkeypatch.setattr(project, "_source", replaced_behind_the_check)
    assert show() == 0
    assert not folder.has_run()
    assert "marker" in harmless.read_text()


def test_a_question_that_takes_long_is_about_what_was_shown(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(io.StringIO):
        def isatty(self) -> bool:
            return True

        def readline(self, *_) -> str:
            folder.write("evil.py", "replaced = 'while the user was reading'\n")
            return "y\n"

    monkeypatch.setattr(sys, "stdin", Slow())
    assert main(["trust"]) == 0
    assert show() == 2
    assert not folder.has_run()


def test_a_plugin_elsewhere_is_shown_and_its_bytes_count(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    elsewhere = tmp_path / "elsewhere.py"
    folder.write("evil.py").rename(elsewhere)
    (folder.path / "evil.py").symlink_to(elsewhere)
    elsewhere.chmod(0o666)
    main(["trust", ".", "--yes"])
    told = capsys.readouterr().out
    assert str(elsewhere) in told and "other users" in told
    assert show() == 0 and folder.has_run()
    elsewhere.write_text(elsewhere.read_text() + "# by somebody else\n")
    assert show() == 2 and not folder.has_run()
    (folder.path / "dstune.yaml").write_text(f"plugins: [{os.path.relpath(elsewhere)}]\n")
    assert show() == 2 and not folder.has_run()


def test_a_file_of_another_user_is_shown(folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(project.os, "getuid", lambda: os.geteuid() + 1)
    assert project.candidates(folder.path)[0].remarks


@pytest.mark.parametrize("mode", [0o644, 0o660])
def test_a_record_that_others_can_reach_does_not_count(folder: Folder, mode: int) -> None:
    main(["trust", ".", "--yes"])
    record = project.record_file(folder.path)
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    record.chmod(mode)
    assert show() == 2
    assert not folder.has_run()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"folder": "/elsewhere", "plugins": {}}', '{"folder": 1}'])
def test_a_record_that_is_none_trusts_nothing(folder: Folder, content: str) -> None:
    main(["trust", ".", "--yes"])
    project.record_file(folder.path).write_text(content)
    assert show() == 2
    assert not folder.has_run()


def test_a_record_of_another_folder_does_not_count(folder: Folder, tmp_path: Path) -> None:
    main(["trust", ".", "--yes"])
    record = project.record_file(folder.path)
    record.write_text(json.dumps(json.loads(record.read_text()) | {"folder": str(tmp_path)}))
    assert show() == 2
    assert not folder.has_run()


def test_the_configuration_of_the_user_is_not_in_the_folder(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that come with a folder (a clone, an archive) belong to the user who unpacked it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", "config")
    monkeypatch.setenv("HOME", str(folder.path.parent))
    assert project.record_file(folder.path).is_relative_to(folder.path.parent / ".config")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    "content",
    ["[" * 50_000, f"{BOMB}plugins: *g\n", "plugins: !!python/object/apply:os.system [touch ../marker]\n"],
    ids=["deep", "aliases", "code"],
)
def test_yaml_of_a_stranger_is_read_within_limits(folder: Folder, content: str, capsys: pytest.CaptureFixture) -> None:
    (folder.path / "dstune.yaml").write_text(content)
    for words in (["train", "--cfg", "job"], ["trust"]):
        assert main(words) == 2
        assert re.search(r"dstune\.yaml:\d", capsys.readouterr().err.splitlines()[0])
    assert not folder.has_run()


@pytest.mark.parametrize("name", ["dstune.yaml", "evil.py"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_is_not_read(folder: Folder, name: str, kind: str) -> None:
    file = folder.path / name
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    for words in (["train", "--cfg", "job"], ["trust"]):
        assert main(words) == 2


# ---- modules and experiments ----


def test_no_package_above_a_module_is_imported_before_it_is_trusted(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    for name in ("installed_for_test/__init__.py", "installed_for_test/plugin.py"):
        folder.write(name)
    (folder.path / "installed_for_test").rename(site / "installed_for_test")
    (folder.path / "dstune.yaml").write_text("plugins: [installed_for_test.plugin]\n")
    assert show() == 2
    assert main(["trust", "--yes"]) == 0
    assert not folder.has_run()
    assert show() == 0
    assert folder.has_run()
    with (site / "installed_for_test" / "plugin.py").open("a") as file:
        file.write("version = 2\n")  # what the user has installed may be updated
    assert show() == 0


def test_an_experiment_outside_of_its_folder_names_no_plugins(folder: Folder, tmp_path: Path) -> None:
    (folder.path / "dstune.yaml").unlink()
    (folder.path / "job.yaml").write_text("# @package _global_\nplugins: [./evil.py]\n")
    conf = Path(__file__).parents[2] / "conf" / "experiment"
    for name in (os.path.relpath(folder.path / "job", conf), str(folder.path / "job")):
        with pytest.raises(UserError):
            compose([f"experiment={name}", "data=chitchat"])
        assert not folder.has_run()
