"""`How to add ...` of CONTRIBUTING.md, followed to the letter in a copy of the tree: one place each, and it works."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import Commands, metrics, result
from support.tiny import save_encoder

ROOT = Path(__file__).parents[2]
KINDS = (
    *("task", "method", "row format", "metric", "callback", "optimizer", "schedule"),
    *("way to split the work", "data source", "launcher", "tracker", "verb"),
)
TASK = ["task=polarity", "task.labels=[against,for]"]
CHOSEN = {
    "task": ["task=polarity"],
    "method": ["method=norms", "method.shifts=false"],
    "row format": ["data.format=survey"],
    "metric": ["trainer.early_stopping.metric=lowest_recall"],
    "callback": ["trainer.callbacks=[{lowest_loss: {digits: 6}}]"],
    "optimizer": ["optimizer=rmsprop", "optimizer.alpha=0.9", "optimizer.lr=1e-3"],
    "schedule": ["schedule=inverse_root", "schedule.warmup_steps=1"],
    "way to split the work": ["task=causal_lm", "parallel=pairs", "launch.processes=2"],
    "launcher": ["launch=polite", "launch.niceness=1"],
    "tracker": ["tracking.table.separator='|'"],
}
MISSPELLED = {
    "task": ("task=polarty", "polarity"),
    "method": ("method.shift=true", "method.shifts"),
    "row format": ("data.format=surveys", "survey"),
    "metric": ("trainer.early_stopping.metric=lowest_recal", "lowest_recall"),
    "callback": ("trainer.callbacks=[{lowest_loss: {digit: 6}}]", "digits"),
    "optimizer": ("optimizer.alfa=0.5", "optimizer.alpha"),
    "schedule": ("schedule=inverse_rot", "inverse_root"),
    "way to split the work": ("parallel.sise=2", "parallel.size"),
    "launcher": ("launch.nicenes=1", "launch.niceness"),
    "tracker": ("tracking.table.seperator=x", "tracking.table.separator"),
}


def blocks() -> dict[str, dict[str, str]]:
    """What is to be written, by kind: the content of each file by its path, which is the first line of a block."""
    chapter = (ROOT / "CONTRIBUTING.md").read_text().split("## How to add ...")[1].split("\n## ")[0]
    found = {}
    for section in chapter.split("\n### ")[1:]:
        kind = re.sub(r"^an? | \(.*", "", section.splitlines()[0])
        code = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", section, re.DOTALL)
        found[kind] = dict(code)
    return found


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Commands:
    folder = tmp_path_factory.mktemp("contribution")
    tree = folder / "tree"
    for name in ("dstune", "dstune_plugins", "dstune_verify", "conf"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    for files in blocks().values():
        for path, content in files.items():
            file = tree / path
            file.parent.mkdir(exist_ok=True)
            before = f"{file.read_text()}\n\n" if file.exists() else ""
            file.write_text(before + content)
    save_encoder(folder / "model")
    rows = [{"answer": f"w{n % 5} w{n % 7} w{n % 3}", "opinion": "for" if n % 3 else "against"} for n in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Commands(folder)
    found.env["PYTHONPATH"] = str(tree)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_one_place(kind):
    """A folder or a file, and a YAML file for what a section chooses; no list elsewhere."""
    paths = blocks()[kind]
    code = {path for path in paths if path.startswith("dstune/")}
    assert len({str(Path(path).parent) for path in code}) == 1
    assert len(code) == 1 or all(not (ROOT / path).parent.exists() for path in code)
    others = paths.keys() - code
    assert len(others) == (kind in ("task", "method", "optimizer", "schedule", "way to split the work", "launcher"))
    assert all(path.startswith("conf/") for path in others)


PROGRAM = """
import json, sys
from dstune.config.compose import compose
from dstune.config.completion import complete
from dstune.config.validate import validate
from dstune.core.errors import UserError
from types import SimpleNamespace

given = json.loads(sys.argv[1])
task = lambda words: [] if "task=causal_lm" in words else given["task"]
assert "tree" in sys.modules["dstune"].__file__
for kind, words in given["chosen"].items():
    validate(compose([*task(words), *words, *given["base"]]).config)
nearest = {}
for kind, wrong in given["misspelled"].items():
    words = given["chosen"][kind]
    try:
        validate(compose([*task(words), *words, wrong, *given["base"]]).config)
    except UserError as error:
        nearest[kind] = str(error)
verbs = {"train": lambda given: SimpleNamespace(words=[], overrides=True, files=False)}
completed = {word: complete(f"dstune train {word}", verbs) for word in given["completed"]}
print(json.dumps([nearest, completed]))
"""
COMPLETED = {
    "task=po": "task=polarity",
    "method=nor": "method=norms",
    "data.format=su": "data.format=survey",
    "trainer.early_stopping.metric=low": "trainer.early_stopping.metric=lowest_recall",
    "trainer.callbacks=[low": "trainer.callbacks=[lowest_loss]",
    "optimizer=rm": "optimizer=rmsprop",
    "schedule=inv": "schedule=inverse_root",
    "parallel=pa": "parallel=pairs",
    "launch=po": "launch=polite",
    "tracking.tab": "tracking.table.",
}


def test_each_composes_is_completed_and_names_the_nearest_key(workplace):
    base = ["model.path=model", "data.train=rows.jsonl", "data.max_length=32"]
    given = {
        "chosen": CHOSEN,
        "misspelled": {k: word for k, (word, _) in MISSPELLED.items()},
        "completed": list(COMPLETED),
    }
    command = [sys.executable, "-c", PROGRAM, json.dumps(given | {"task": TASK, "base": base})]
    done = subprocess.run(command, cwd=workplace.folder, env=workplace.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    nearest, completed = json.loads(done.stdout)
    for kind, (word, right) in MISSPELLED.items():
        assert right in nearest[kind], (word, nearest[kind])
    assert completed == {word: [name] for word, name in COMPLETED.items()}


def test_help_names_each(workplace):
    text = workplace.run("train", "--help", "all").stdout
    words = (
        "polarity",
        "norms",
        "survey",
        "lowest_recall",
        "lowest_loss",
        "rmsprop",
        "inverse_root",
        "pairs",
        "polite",
    )
    keys = ("method.shifts=", "optimizer.alpha=", "launch.niceness=", "tracking.table.separator=")
    assert [word for word in (*words, *keys) if word not in text] == []
    assert "print how many steps a run has taken" in workplace.run("--help").stdout


@pytest.mark.ci
def test_all_work_together(workplace):
    words = [word for kind in CHOSEN.keys() - {"way to split the work"} for word in CHOSEN[kind]]
    done = workplace.run(
        *("train", "model.path=model", "data.train=newest://.", "data.max_length=32", "run.dir=run", *TASK, *words),
        *(
            "data.split.validation=0.2",
            "trainer.micro_batch_size=4",
            "trainer.global_batch_size=8",
            "trainer.max_steps=4",
        ),
        *("evaluate.every=2", "launch.processes=1", "launch.in_process=true"),
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    rows = [row for row in metrics(workplace.folder / "run") if "loss" in row]
    final = result(workplace.folder / "run")
    assert final["best"]["metric"] == "lowest_recall"
    assert final["lowest_loss"] == round(min(row["loss"] for row in rows), 6)
    assert [row["lr"] for row in rows[1:]] == pytest.approx([1e-3, 1e-3 / 2**0.5, 1e-3 / 3**0.5])
    table = (workplace.folder / "run" / "losses.txt").read_text().splitlines()
    assert table == [f"{row['step']}|{row['loss']}" for row in rows]
    assert workplace.run("steps", "run").stdout == "4\n"
    answered = workplace.run("predict", "run", "--text", "w1 w2 w1", "--json")
    assert json.loads(answered.stdout)["predicted"] in ("for", "against"), answered.stderr
