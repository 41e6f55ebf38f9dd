"""`dstune init plugin`: what it writes is a plugin as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstune.cli import main
from dstune.config.compose import compose
from dstune.config.validate import validate
from dstune.core import plugins
from dstune.testing import check_plugin
from dstune.testing.scaffold import TEMPLATES

ROWS = [{"text": f"w{n % 5} w{n % 7} w{n % 3}", "label": "odd" if n % 3 else "even"} for n in range(24)]
TAKEN = [
    *(("task", "chat"), ("method", "lora"), ("row_format", "messages"), ("metric", "loss")),
    *(("callback", "memory"), ("optimizer", "adamw")),
]
BESIDE = {
    "task": [],
    "method": ["task=classification"],
    "row_format": ["task=classification"],
    "metric": ["task=classification"],
    "callback": ["task=classification"],
    "optimizer": ["task=classification"],
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    plugins.activate([])


@pytest.mark.parametrize("kind", TEMPLATES)
def test_what_is_written_composes(kind, capsys):
    assert main(["init", "plugin", kind, f"my_{kind}.py"]) == 0
    words = capsys.readouterr().out.split("plugins=")[1].split()[1]
    composed = compose([f"plugins=[my_{kind}.py]", "data.train=rows.jsonl", *BESIDE[kind], words])
    validate(composed.config)
    assert composed.plugins[0].registers == (f"{kind.replace('_', ' ')} my_{kind}",)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["plugin", "task", "there.py"], "exists already"),
        (["plugin", "task", "my-task.py"], "is a Python file whose name is a name in Python"),
        (["plugin", "task", "nowhere/my_task.py"], "cannot be written"),
        (["plugin", "tusk", "a.py"], "there is no such choice"),
        *((["plugin", kind, f"{name}.py"], f"named '{name}' already\n    fix: my_{name}.py") for kind, name in TAKEN),
    ],
)
def test_what_is_refused(words, reason, capsys):
    Path("there.py").write_text("")
    assert main(["init", *words]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "fix"),
    [([], "DATA key=value"), (["plugin"], "plugin KIND FILE"), (["plugin", "task"], "plugin task FILE")],
)
def test_the_fix_repeats_the_words_that_were_given(words, fix, capsys):
    assert main(["init", *words]) == 2
    assert f"fix: dstune init {fix}\n" in capsys.readouterr().err


PROVED = ["trained", "ranks", "resume", "evaluation", "prediction", "export"]
"""How the lines of `check_plugin` begin."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", TEMPLATES)
def test_what_is_written_passes_the_check(kind, folder, capsys):
    assert main(["init", "plugin", kind, f"my_{kind}.py"]) == 0
    words = capsys.readouterr().out.split("plugins=")[1].split()[1]
    rows = [{"question": row["text"], "kind": row["label"]} for row in ROWS] if kind == "row_format" else ROWS
    found = check_plugin(f"my_{kind}.py", *BESIDE[kind], words, rows=rows, folder=folder / "scratch")
    assert found["result"]["status"] == "completed"
    proved = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if ": " in line]
    assert [word for word in proved if word in PROVED] == PROVED
