"""A printed command is code: what `plan`, `init`, `import`, a plugin's template and the end of a run print is run as far as the
composition of its configuration, and the commands in all texts of the program have verbs and flags that exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.configs import run_config
from support.printed_commands import FILLED, check, in_texts_of, printed
from unit.test_starter import ROWS

import dstune
from dstune import cli
from dstune.config import trust
from dstune.config.names import all_keys, sections
from dstune.config.run_file import Composed, write_run
from dstune.config.words import packaged_choices
from dstune.core.errors import UserError
from dstune.core.verb import VERBS
from dstune.launch import plan, starter
from dstune.launch.summary import summary
from dstune.protocols import METHODS, TASKS

IMPORTS = Path(__file__).parents[1] / "data" / "imports"
CONFIGURATIONS = sorted(path for path in IMPORTS.glob("*/*.*") if path.suffix in (".yaml", ".sh"))
PLANS = [
    "model=llama3_8b task=chat hardware=8xH100-80G",
    "model=llama3_8b hardware=24G",
    "model=llama3_8b method=qlora data=chitchat hardware=24G",
    "model=llama3_70b method=lora data=chitchat hardware=8xH100-80G nodes=2 price=2.5",
    "experiment=sentiment hardware=8xH100 nodes=2",
    "experiment=quickstart",
    "model=qwen3_14b data.max_length=4096 data.train=rows.jsonl hardware=A100-40G",
    "model=qwen3_8b data.mixture.a.path=rows.jsonl hardware=L4",
    "model=qwen3_1.7b task=preference data.train=rows.jsonl hardware=RTX4090",
    "model=modernbert_base task=classification data.train=rows.jsonl hardware=T4",
    "model=qwen3_8b data=chitchat zero=file zero.path=ds_config.json hardware=8xH100-80G",
    "my.yaml hardware=A100-80G",
    "my.yaml trainer.micro_batch_size=16 model=qwen3_8b hardware=24G",
    "'run.name=my own' data=chitchat model=qwen3_8b hardware=24G",
]


def sampled(cases: Iterable[Any]) -> list[Any]:
    """Return the cases, of which `make test` runs one in six, and `make test-ci` all: each takes a second."""
    return [pytest.param(case, marks=[pytest.mark.ci] if position % 6 else []) for position, case in enumerate(cases)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    rows = "".join(json.dumps({"messages": turns}) + "\n" for _ in range(4))
    for name in ("rows.jsonl", "FILE"):
        Path(name).write_text(rows, encoding="utf-8")
    Path("my.yaml").write_text("model: qwen3_0.6b\ndata: {train: rows.jsonl}\ntask: chat\n", encoding="utf-8")
    Path("ds_config.json").write_text('{"zero_optimization": {"stage": "auto"}}', encoding="utf-8")
    return tmp_path


def refusals(commands: list[list[str]]) -> list[str]:
    """Return the commands that are refused, each with the first reason. Fails where there is no command at all."""
    assert commands
    refused = []
    for words in commands:
        try:
            check(words)
        except UserError as error:
            refused.append(f"dstune {' '.join(words)}: {error.problems[0]}")
    return refused


@pytest.mark.parametrize("words", sampled(PLANS))
def test_what_plan_prints(words: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert plan.main(shlex.split(words)) == 0
    assert refusals(printed(capsys.readouterr().out)) == []


@pytest.mark.parametrize("name", sampled(ROWS))
def test_what_init_prints(name: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    Path("own rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[name][0]), encoding="utf-8")
    assert starter.main(["own rows.jsonl", "--output", "my own.yaml"]) == 0
    written = Path("my own.yaml").read_text(encoding="utf-8")
    commands = printed(capsys.readouterr().out + written.replace("FILE", "'my own.yaml'"))
    assert refusals([words for words in commands if "KEY" not in words]) == []


def test_the_fix_where_no_task_reads_the_columns(folder: Path):
    Path("own.jsonl").write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    with pytest.raises(UserError) as refused:
        starter.main(["own.jsonl", "--output", "own.yaml"])
    assert printed(refused.value.problems[0].fix)


@pytest.mark.parametrize(
    "file",
    sorted(path for path in IMPORTS.glob("*/*.*") if path.suffix in (".yaml", ".sh")),
    ids=lambda path: path.stem,
)
def test_what_import_prints(file: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(file.parent, "tool")
    code = cli.main(["import", f"tool/{file.name}", "--output", "my conf/experiment/imported.yaml"])
    text = capsys.readouterr().out
    commands = printed(text)
    assert commands[-1][0] == "train"
    if code == 0:
        assert refusals(commands) == []
    else:
        assert "next: " not in text and "to fix before it runs" in text
        check(["train", "--cfg", "job", *commands[-1][1:]])


@pytest.mark.parametrize("task", TASKS.configs())
def test_what_the_end_of_a_run_prints(task: str, folder: Path):
    for method in ("full", "lora", "prompt"):
        run = folder / "runs" / f"of mine {method}"
        (run / "export").mkdir(parents=True)
        write_run(
            run / "run.yaml", Composed(run_config(task=TASKS.configs()[task](), method=METHODS.configs()[method]()), [])
        )
        (run / "result.json").write_text(json.dumps({"steps": 3, "export": str(run / "export")}), encoding="utf-8")
        assert refusals(printed(summary(run))) == []


def test_commands_in_texts_exist():
    """Verbs have their flags, keys and choices exist, and what has no placeholder composes."""
    commands = list(in_texts_of(Path(dstune.__file__).parent))
    wrong = [f"{place}: dstune {' '.join(words)}: {reason}" for place, words in commands for reason in faults(words)]
    assert wrong == []
    assert len(commands) > 200


@cache
def flags_of(verb: str) -> tuple[str, ...] | None:
    """Return the flags of a verb; None if it reads its words without a parser."""
    parser = VERBS[verb]().parser()
    return None if parser is None else (*parser._option_string_actions, trust.FLAG)


def faults(words: list[str]) -> list[str]:
    verb, *rest = words
    flags = flags_of(verb)
    if flags is not None:
        return [f"no flag {word}" for word in rest if word.startswith("-") and word.partition("=")[0] not in flags]
    settings = [word for word in rest if "=" in word and FILLED not in word and not word.startswith("-")]
    keys = {*all_keys(), *sections(), *packaged_choices(), *plan.NUMBERS, "KEY", "key", "hardware", "nodes"}
    wrong = [f"no key {word}" for word in settings if word.partition("=")[0] not in keys]
    if any(re.search(r"[A-Z]{2,}|FILLED", word) for word in rest) or verb != "train" or not settings:
        return wrong
    return [*wrong, *refusals([words])]
