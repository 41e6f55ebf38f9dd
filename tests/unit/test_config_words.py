"""What a word without `=` was meant to be, values that the shell cut in pieces, and what other tools call things."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstune.cli import VERBS
from dstune.config.compose import compose
from dstune.config.convert import example
from dstune.config.flags import hydra_flags
from dstune.config.names import all_keys, default_of
from dstune.config.overrides import parse
from dstune.config.words import meaning, packaged_choices, rejoined
from dstune.core.arguments import VerbParser
from dstune.core.errors import Problem, UserError
from dstune.core.verb import other_names


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["trainer.max_steps"], "for example trainer.max_steps=100"),
        (["data.max_length"], "data.max_length=1024 (the default)"),
        (["quickstart"], "did you mean experiment=quickstart?"),
        (["lora"], "did you mean method=lora?"),
        (["experiment", "quickstart"], "write experiment=quickstart"),
        (["rows.jsonl"], "did you mean data.train=rows.jsonl?"),
        (["my rows.csv"], "did you mean 'data.train=my rows.csv'?"),
        (["mine.yaml"], "`dstune train mine.yaml` reads a configuration file"),
        (["run"], "write run.KEY=VALUE"),
        (["max_steps"], "did you mean trainer.max_steps=VALUE?"),
        (["runs/quickstart/2026"], None),
    ],
)
def test_meaning(words: list[str], meant: str | None):
    assert meaning(words[0], words[1:]) == meant


def test_a_folder_with_a_model_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("zephyr").mkdir()
    Path("zephyr/config.json").touch()
    assert meaning("zephyr") == "did you mean model.path=zephyr?"


def test_the_choices_are_those_that_hydra_finds():
    from dstune.config.hydra_session import group_options, session

    with session() as hydra:
        found = {group: sorted(names) for group, names in group_options(hydra).items()}
    assert packaged_choices() == found


def test_every_key_has_an_example_that_composes():
    keys = [key for key in all_keys() if ".name" not in key]
    assert all(example(key) for key in keys)
    for key in ("trainer.max_steps", "data.max_rows", "run.time_limit", "model.attention", "tracking.tags"):
        line = example(key).removeprefix("for example ").removesuffix(" (the default)").strip("'")
        assert compose(["data=chitchat", line]).overrides[-1] == line
    assert default_of("trainer.early_stopping.patience") == 0


def test_what_the_shell_split_is_joined_in_the_fix():
    words = ["data.columns={text:", "review,", "label:", "stars}", "trainer.seed=1", "optimizer.betas=[0.9,", "0.99]"]
    whole, problems = rejoined(words)
    assert whole == ["trainer.seed=1"]
    assert [problem.fix for problem in problems] == [
        "'data.columns={text: review, label: stars}'",
        "'optimizer.betas=[0.9, 0.99]'",
    ]
    assert rejoined(["data.columns={text:", "review"]) == (["data.columns={text:", "review"], [])  # never closed


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["data.columns={text: review"], "'data.columns={text: review}'"),
        (["experiment=a,b"], "`dstune train --multirun` starts them"),
        (["method=lora,full"], "`dstune train --multirun` starts them; one of them is method=lora"),
        (["trainer.seed=1,2"], "`dstune train --multirun` starts them; one of them is trainer.seed=1"),
        (["tracking.tags=a,b"], "tracking.tags=[a,b]"),
        (["data.columns={text: Body of (it)}"], """quote its values: 'data.columns={text: "Body of (it)"}'"""),
        (["run.name=a,b"], "quote the value for Hydra inside quotes for the shell: 'run.name=\"a,b\"'"),
        (["data.train=~/x"], f"data.train={Path.home() / 'x'}"),
        (["run.name=my", "own"], "quote both: 'run.name=my own'"),
    ],
)
def test_grammar(words: list[str], fix: str):
    [problem] = parse(words)[1]
    assert problem.fix.endswith(fix)


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["--lr", "1e-4"], "write optimizer.lr=1e-4"),
        (["--max_steps=5"], "write trainer.max_steps=5"),
        (["--resume", "runs/x"], "`dstune train runs/x` continues a run; run.resume=runs/x starts another one"),
        (["--checkpoint", "x"], "it belongs to `dstune export` and `dstune generate`"),
        (["--config", "c.yaml"], "`dstune train c.yaml`"),
        (["--cfg"], "--cfg job"),
    ],
)
def test_flags_of_other_tools_and_verbs(words: list[str], fix: str):
    with pytest.raises(UserError) as caught:
        hydra_flags(words)
    assert caught.value.problems[0].fix.startswith(fix)


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("data=rows.jsonl", "data.train=rows.jsonl"),
        ("model=org/name", "model.path=org/name"),
        ("zero=3", "zero=stage3"),
        ("launch.nodes=2", "it is a key of launch=slurm"),
        ("trainer.bf16=true", "trainer.precision=bf16"),
        ("trainer.precision=half", "trainer.precision=fp16"),
        ("trainer.precision=quarter", "trainer.precision=auto (the default)"),
        ("data.columns=text:review", "'data.columns={text: review}'"),
    ],
)
def test_fixes_lead_to_what_was_meant(override: str, fix: str):
    with pytest.raises(UserError) as caught:
        compose(["data.train=x.jsonl", override] if not override.startswith("data=") else [override])
    assert fix in next(problem.fix for problem in caught.value.problems if problem.where == override.split("=")[0])


def test_names_of_other_tools_lead_to_verbs_that_exist():
    others = other_names()
    assert not set(others) & set(VERBS)
    assert {fix.split("`")[1].split()[1] for fix in others.values()} <= set(VERBS)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], Problem("RUN", "this is missing", "dstune status RUN")),
        (["x", "--jsn"], Problem("command line", "this verb has no such argument", "did you mean --json?", "--jsn")),
        (
            ["x", "y"],
            Problem(
                "command line", "this verb has no such argument", "`dstune status --help` explains what it takes", "y"
            ),
        ),
        (["x", "--kind", "bets"], Problem("--kind", "there is no such choice", "did you mean best?", "bets")),
        (["x", "--kind", "q"], Problem("--kind", "there is no such choice", "one of best, last", "q")),
    ],
)
def test_arguments_of_a_verb(words: list[str], problem: Problem):
    parser = VerbParser(prog="dstune status")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--kind", choices=("best", "last"))
    with pytest.raises(UserError) as caught:
        parser.parse_args(words)
    assert caught.value.problems == [problem]


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["method=lora"], "optimizer.lr=0.0002 (the default)"),
        (["optimizer=lion"], "optimizer.lr=2e-06 (the default)"),
        (["optimizer=lion", "method=lora"], "optimizer.lr=2e-05 (the default)"),
        (["optimizer=sgd"], "optimizer.lr=0.001 (the default)"),
        (["method=loar"], "leave it out, and optimizer.lr is the default of the method"),
    ],
)
def test_a_default_in_a_fix_is_what_composing_gives(words: list[str], fix: str):
    with pytest.raises(UserError) as caught:
        compose(["data.train=x.jsonl", "optimizer.lr=fast", *words])
    assert fix in {problem.fix for problem in caught.value.problems if problem.where == "optimizer.lr"}
    if fix.startswith("optimizer.lr="):
        rate = float(fix.split("=")[1].split()[0])
        assert compose(["data.train=x.jsonl", *words]).config.optimizer.lr == rate


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["data=chitchat", "method.dora"], "for example method=lora method.dora=false"),
        (["data=chitchat", "text"], "for example trainer.max_steps=100"),
        (
            ["run.name=my", "own"],
            "for example trainer.max_steps=100; or, if it belongs to the word before, quote both: 'run.name=my own'",
        ),
    ],
)
def test_a_bare_word_gets_a_fix_that_is_accepted(words: list[str], fix: str):
    [problem] = parse(words)[1]
    assert problem.fix == fix


@pytest.mark.parametrize(("name", "preset"), [("lama3", "model=llama3_8b"), ("gwen3", "model=qwen3_8b")])
def test_a_misspelt_family_leads_to_its_presets(name: str, preset: str):
    with pytest.raises(UserError) as caught:
        compose(["data=chitchat", f"model={name}"])
    assert preset in caught.value.problems[0].fix
