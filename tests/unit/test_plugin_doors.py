"""The worked examples of docs/plugins.md for data sources and verbs, written down and used as the page says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.plugins import folder_of_plugins

from dstune.cli import find_verb, help_text, main
from dstune.config.compose import compose
from dstune.core import plugins
from dstune.core.errors import UserError
from dstune.data import sources
from dstune.inference.answers_file import answers_file
from dstune.launch.preflight import resolve_rows
from dstune.protocols import DATA_SOURCES, VERBS

PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"
EXAMPLES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL))

folder = pytest.fixture(folder_of_plugins)


def write(*names: str) -> None:
    for name in names:
        Path(name).write_text(EXAMPLES[name])


def test_rows_of_a_data_source_of_a_plugin(folder: Path, capsys) -> None:
    write("newest.py")
    (folder / "incoming").mkdir()
    for number, name in enumerate(("new", "old")):
        file = folder / "incoming" / f"{name}.jsonl"
        file.write_text(json.dumps({"text": f"{name} text", "label": "a"}) + "\n")
        os.utime(file, (1000 - number, 1000 - number))
    config = compose(["plugins=[./newest.py]", "task=classification", "data.train=newest://incoming"]).config
    data = resolve_rows(config.data, "train", lambda text: None)
    assert data.train == f"newest://{folder}/incoming/new.jsonl"
    (file,) = sources.expand(str(data.train), "data.train")
    assert json.loads(file.path.read_text())["text"] == "new text"
    with pytest.raises(UserError, match=r"the folder has no \.jsonl file"):
        DATA_SOURCES["newest"]().resolve("newest://.", "data.train", print)
    with pytest.raises(UserError, match="nothing is known to write there"):  # it only reads
        answers_file("newest://incoming", {}, 1, force=False)
    assert [plugin.name for plugin in plugins.used_by(config)] == ["newest"]


def test_a_verb_of_a_plugin_is_there_where_the_user_trusts_it(folder: Path, capsys) -> None:
    write("steps.py")
    (folder / "dstune.yaml").write_text("plugins: [./steps.py]\n")
    assert find_verb("steps") is None
    assert "have not trusted this folder" in capsys.readouterr().err
    assert "steps" not in VERBS.without_installed()
    assert main(["trust", ".", "--yes"]) == 0
    assert "  steps        print how many steps a run has taken" in help_text()
    run = folder / "run"
    run.mkdir()
    assert main(["steps", str(run)]) == 2
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["steps", "--help"])
    assert "How many steps a run has taken." in capsys.readouterr().out
    assert main(["stepps"]) == 2
    assert "did you mean `dstune steps`?" in capsys.readouterr().err


def test_a_plugin_that_breaks_does_not_break_the_help(folder: Path, capsys) -> None:
    (folder / "broken.py").write_text("import nothing_of_that_name\n")
    (folder / "dstune.yaml").write_text("plugins: [./broken.py]\n")
    assert main(["trust", ".", "--yes"]) == 0
    assert main(["--help"]) == 0
    found = capsys.readouterr()
    assert "  train " in found.out
    assert "note: lists no verbs of plugins: ./broken.py:1" in found.err


def test_a_plugin_of_verbs_alone_is_none_of_a_run(folder: Path) -> None:
    write("steps.py")
    site = folder / "site"
    (site / "mysteps-1.0.dist-info").mkdir(parents=True)
    (site / "mysteps.py").write_text(EXAMPLES["steps.py"])
    (site / "mysteps-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mysteps\nVersion: 1.0\n")
    (site / "mysteps-1.0.dist-info" / "entry_points.txt").write_text("[dstune.plugins]\nsteps = mysteps\n")
    program = (
        "from dstune.cli import main; from dstune.config.compose import compose; from dstune.core import plugins\n"
        "assert main(['steps', 'no-run']) == 2\n"
        "config = compose(['data=chitchat']).config\n"
        "print([plugin.name for plugin in plugins.used_by(config)])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
