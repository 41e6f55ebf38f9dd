"""Hydra's flags through the verbs, the help, the documentation of keys and completion in the shell."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dstune import cli
from dstune.checkpoint.quantization import GGUF_TYPES
from dstune.config import flags as hydra
from dstune.config.completion import complete
from dstune.config.compose import compose
from dstune.config.convert import to_dict
from dstune.config.documentation import documentation, help_text, merged, topic
from dstune.config.flags import Flags, hydra_flags, show
from dstune.config.guidance import GUIDANCE
from dstune.config.names import all_keys, names_choice, sections
from dstune.core.errors import UserError

VERBS = {name: verb().words for name, verb in cli.VERBS.classes().items()}


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert show(hydra_flags(argv), VERBS) == 0
    return capsys.readouterr().out


def refused(*argv: str) -> UserError:
    with pytest.raises(UserError) as caught:
        show(hydra_flags(argv), VERBS)
    return caught.value


# ---- reading flags ----


def test_overrides_and_flags_in_any_order():
    read = hydra_flags(
        ["method=lora", "--config-dir", "a", "--cfg", "job", "trainer.seed=1", "-cd", "b", "~x", "-p", "run"]
    )
    assert read == Flags(["method=lora", "trainer.seed=1", "~x"], config_dirs=["a", "b"], cfg="job", package="run")
    assert read.shows
    assert not hydra_flags(["method=lora"]).shows


@pytest.mark.parametrize(
    ("argv", "info", "overrides"),
    [
        (["--info"], "all", []),
        (["--info", "defaults", "x=1"], "defaults", ["x=1"]),
        (["-i", "x=1"], "all", ["x=1"]),
        (["--info=searchpath"], "searchpath", []),
    ],
)
def test_the_value_of_info_may_be_left_out(argv: list[str], info: str, overrides: list[str]):
    read = hydra_flags(argv)
    assert (read.info, read.overrides) == (info, overrides)


@pytest.mark.parametrize(
    ("argv", "where", "text"),
    [
        (["--max-steps", "5"], "--max-steps", "write trainer.max_steps=5"),
        (["--learning_rate=3"], "--learning_rate", "write optimizer.lr=3"),
        (["--confg-dir=x"], "--confg-dir", "did you mean --config-dir?"),
        (["--zzz"], "--zzz", "no such flag"),
        (["--cfg", "jb"], "command line", "choose from"),
        (["--cfg"], "command line", "expected one argument"),
        (["--info=x"], "--info", "searchpath"),
        (["--multirun"], "--multirun", "sweep"),
        (["--config-name", "x"], "--config-name", "experiment="),
        (["--resolve"], "--resolve", "--cfg"),
        (["--package", "run"], "--package", "--cfg"),
    ],
)
def test_wrong_flags_are_user_errors(argv: list[str], where: str, text: str):
    error = refused(*argv)
    assert [problem.where for problem in error.problems] == [where]
    assert text in str(error)
    assert error.exit_code == 2


def test_all_wrong_flags_at_once():
    assert len(refused("--max-steps", "5", "--cgf", "job", "--multirun").problems) == 3


# ---- showing ----


def test_cfg_job(capsys: pytest.CaptureFixture[str]):
    config = yaml.safe_load(printed(capsys, "--cfg", "job", "trainer.max_steps=3"))
    assert config["run"]["name"] == "quickstart"
    assert config["trainer"]["max_steps"] == 3
    assert "hydra" not in config and "experiment" not in config


def test_cfg_has_the_values_of_a_deepspeed_file(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    path = tmp_path / "z3.json"
    content = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "sub_group_size": 10},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7}},
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
    }
    path.write_text(json.dumps(content))
    argv = (
        "--cfg",
        "job",
        "data=chitchat",
        "zero=file",
        f"zero.path={path}",
        "trainer.seed=2",
        "trainer.epochs=${trainer.seed}",
    )
    config = yaml.safe_load(printed(capsys, *argv))
    run = to_dict(compose(argv[2:]).config)
    assert config["trainer"].pop("epochs") == "${trainer.seed}"
    del run["trainer"]["epochs"], run["task"], config["task"]  # today's date
    assert {key: value for key, value in config.items() if key in run} == run
    # What only the machine of the run has in its environment leaves the rest to be looked at.
    unset = printed(capsys, *argv, "trainer.seed=${oc.env:DSTUNE_TEST_UNSET}", "-p", "trainer")
    assert "seed: ${oc.env:DSTUNE_TEST_UNSET}" in unset
    path.write_text("{")
    assert refused(*argv).problems[0].where == f"{path}:1"
    assert "hydra:" in printed(capsys, "--cfg", "hydra", *argv[2:])


def test_cfg_hydra_and_all(capsys: pytest.CaptureFixture[str]):
    assert list(yaml.safe_load(printed(capsys, "--cfg", "hydra"))) == ["hydra"]
    assert {"hydra", "model"} <= set(yaml.safe_load(printed(capsys, "--cfg", "all")))


def test_package(capsys: pytest.CaptureFixture[str]):
    out = printed(capsys, "--cfg", "job", "--package", "trainer")
    assert out.startswith("# @package trainer\n")
    assert "max_steps" in yaml.safe_load(out)
    assert printed(capsys, "--cfg", "job", "-p", "trainer.epochs") == "1\n"
    assert "trainer" in refused("--cfg", "job", "-p", "trainr").problems[0].fix


def test_references_are_shown_as_written_unless_resolved(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SECRET_NAME", "hunter2")
    argv = ("--cfg", "job", "run.dir=${oc.env:SECRET_NAME}")
    assert "hunter2" not in printed(capsys, *argv)
    assert "dir: hunter2" in printed(capsys, *argv, "--resolve")


def test_wrong_overrides_are_explained_for_every_flag():
    for argv in (["--cfg", "job"], ["--cfg", "hydra"], ["--info", "defaults"]):
        error = refused(*argv, "method=lorra", "trainer.max_step=3")
        assert [problem.where for problem in error.problems] == ["method", "trainer.max_step"]


@pytest.mark.parametrize(
    ("overrides", "wheres"),
    [
        (["optimizer.lr=-1"], ["optimizer.lr"]),
        (["method=lora", "method.rank=0", "trainer.epochs=abc"], ["trainer.epochs", "method.rank"]),
        (["data=files"], ["data.train"]),
        (["trainer.seed=${trainer.sed}"], ["trainer.seed"]),
        (["trainer.seed=${oc.env:DSTUNE_TEST_UNSET}", "optimizer.lr=-1"], ["optimizer.lr"]),
    ],
)
def test_cfg_refuses_what_train_refuses(overrides: list[str], wheres: list[str]):
    for argv in (["--cfg", "job"], ["--cfg", "all"], ["--cfg", "job", "-p", "run"]):
        assert [problem.where for problem in refused(*argv, *overrides).problems] == wheres


def test_cfg_refuses_a_choice_that_the_experiment_overrides(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nmodel: {path: sample://smollm2}\n")
    error = refused("--cfg", "job", "--config-dir", str(tmp_path), "experiment=mine", "data=chitchat", "model=minilm")
    assert [problem.where for problem in error.problems] == ["model"]


def test_info(capfd: pytest.CaptureFixture[str]):
    assert show(hydra_flags(["--info", "defaults", "experiment=sentiment"]), VERBS) == 0
    assert "experiment/sentiment" in capfd.readouterr().out


def test_hydra_help(capsys: pytest.CaptureFixture[str]):
    out = printed(capsys, "--hydra-help")
    assert "== Flags ==" in out
    assert "dstune -sc install=bash" in out


@pytest.fixture
def my_groups(tmp_path: Path) -> list[str]:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("defaults: [lora, _self_]\n")
    return ["--config-dir", str(tmp_path)]


def test_help_of_all_has_groups_keys_and_flags_but_not_the_schema(
    capsys: pytest.CaptureFixture[str], my_groups: list[str]
):
    out = printed(capsys, "--help", "all", *my_groups)
    assert "importance, lora, mine, oft" in out
    assert not re.search(r"(?m)^ *schema\b|\bschema/", out)  # the group, which members come from
    for key in all_keys():
        assert names_choice(key) or f"  {key}=" in out
    for flag in hydra.CFG:
        assert flag in out
    assert max(len(line) for line in out.splitlines()) <= 120


def test_help_is_an_index_of_a_page(capsys: pytest.CaptureFixture[str], my_groups: list[str]):
    out = printed(capsys, "--help", *my_groups)
    assert len(out.splitlines()) <= 75
    for section in (*sections(), "experiment"):
        assert f"\n  {section} " in out
    assert "--help optimizer.lr" in out


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("optimizer.lr", ["type a number range at least 0", "0.0002 with method=lora|qlora", "three times", "optimizer.lr=2e-05"]),
        ("optimizer.lr", ["lion: 0.1 times the rate for adamw sgd: 0.001", "also learning_rate in other tools"]),
        ("zero.stage", ["range at least 0 and at most 3 default   auto"]),
        ("trainer.precision", ["one of auto, fp32, bf16, fp16"]),
        ("trainer.early_stopping.metric", ["values loss, text_loss, perplexity"]),
        ("trainer.early_stopping", ["trainer.early_stopping.patience=0"]),
        ("data.mixture.NAME.weight", ["How often its rows come"]),
        ("plugins", ["Files"]),
        ("optimizer", ["adamw", "fused AdamW", "optimizer.betas=[0.9,0.999] [optimizer=adamw|adamw_8bit|muon]"]),
        ("method", ["  mine", "Low-rank adapters on frozen weights"]),
        ("method=lora", ["Low-rank adapters on frozen weights", "method.rank=16"]),
        ("lora", ["method=lora", "method.rank=16"]),
        ("sentiment", ["data=sentiment", "experiment=sentiment"]),
        ("trainer", ["trainer.max_steps=null"]),
    ],
)  # fmt: skip
def test_help_of_a_group_a_choice_and_a_key(
    capsys: pytest.CaptureFixture[str], my_groups: list[str], name: str, texts: list[str]
):
    out = " ".join(printed(capsys, "--help", name, *my_groups).split())
    for text in texts:
        assert " ".join(text.split()) in out
    assert "method.share" not in out or name == "method"


def test_help_of_what_does_not_exist_names_the_nearest():
    for name, similar in (("trainer.epoch", "trainer.epochs"), ("lorra", "lora"), ("optimzer", "optimizer")):
        assert f"--help {similar}" in refused("--help", name).problems[0].fix


def test_help_of_a_key_is_one_block_whatever_choices_have_it():
    for key in ("optimizer.lr", "task.beta", "launch.processes"):
        lines = topic(key, {}).splitlines()
        assert [line for line in lines if not line.startswith(" ")] == lines[:1]
        titles = [line[:12].strip() for line in lines[1:] if line[:12].strip()]
        order = ("meaning", "type", "values", "range", "default", "advice", "example", "also")
        assert titles == [title for title in order if title in titles]


def test_advice_is_for_the_choice_that_it_was_written_for():
    assert "advice    preference: 0.1 stays close to the reference" in topic("task.beta", {})
    assert "advice    lora|qlora: 8 to 16 for style" in topic("method.rank", {})
    assert "advice    8 to 32 for a few thousand rows" in topic("trainer.global_batch_size", {})


def test_every_key_has_help(capsys: pytest.CaptureFixture[str]):
    assert set(GUIDANCE) <= set(all_keys())
    for key in [*all_keys()]:
        if not names_choice(key):
            assert "meaning" in topic(key, {})


# ---- documentation ----


def test_every_key_is_documented_once_for_each_choice():
    documented = {setting.key for setting in documentation() if ".NAME." not in setting.key}
    assert documented == {key for key in all_keys() if not names_choice(key)}
    assert [setting.key for setting in documentation() if not setting.doc.endswith((".", "..."))] == []
    assert len(set(documentation())) == len(documentation())


def test_a_row_of_the_documentation():
    rank = next(setting for setting in documentation() if setting.key == "method.rank")
    assert rank == ("method=lora", "method.rank", "a whole number", "16", "Rank of the update matrices.")
    precision = next(setting for setting in documentation() if setting.key == "trainer.precision")
    assert precision.type == "one of auto, fp32, bf16, fp16"


def test_equal_keys_of_choices_are_one_row():
    steps = [setting.group for setting in merged() if setting.key == "schedule.warmup_steps"]
    ratios = [setting.group for setting in merged() if setting.key == "schedule.warmup_ratio"]
    assert steps == [
        "schedule=cosine|linear|constant|warmup_stable_decay|deepspeed"
    ]  # slanted_triangular has a cut instead
    assert ratios == ["schedule=cosine|linear|warmup_stable_decay|deepspeed", "schedule=constant"]


def test_tables_of_keys_are_one_for_each_section():
    from tools.guides import keys_tables

    text = keys_tables()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    sections = {setting.key.partition(".")[0] for setting in merged()}
    assert {
        line.removeprefix("### ").partition(":")[0] for line in text.splitlines() if line.startswith("#")
    } == sections
    assert lines[1] == "| --- | --- | --- | --- |"
    for line in lines:
        assert line.replace("\\|", "").count("|") == 5
    assert len(lines) == 2 * len(sections) + len(merged())


def test_help_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_text({"method": ["full", "lora"]})
    assert (
        len([line for line in text.splitlines() if len(line) > 80 and not line.startswith(("  ", "over", "Fine"))]) == 0
    )


# ---- completion ----


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dstune ", list(VERBS)),
        ("dstune e", ["evaluate", "export"]),
        ("dstune train mod", ["model.", "model="]),
        ("dstune train model=minil", ["model=minilm"]),
        ("dstune train experiment=quick", ["experiment=quickstart"]),
        ("dstune train method=lora method.r", ["method.rank=", "method.rank_pattern=", "method.rslora="]),
        ("dstune train method=full method.r", []),
        ("dstune train trainer.early", ["trainer.early_stopping."]),
        ("dstune train trainer.precision=", [f"trainer.precision={p}" for p in ("auto", "bf16", "fp16", "fp32")]),
        ("dstune train data.packing=t", ["data.packing=true"]),
        ("dstune train run.time_limit=", ["run.time_limit=null"]),
        ("dstune train broken[ method=nonsense trainer.ep", ["trainer.epochs="]),
        ("dstune train --cf", ["--cfg"]),
        ("dstune train --cfg ", ["job", "hydra", "all"]),
        ("dstune nonsense mod", []),
        ("dstune data ", ["shift", "show"]),
        ("dstune data show --ro", ["--row", "--rows"]),
        ("dstune data show --split ", ["guard", "ood", "test", "train", "validation"]),
        ("dstune completion ", ["bash", "fish", "zsh"]),
        ("dstune samples mi", ["minilm"]),
        ("dstune plan hardware=H1", ["hardware=H100-80G"]),
        ("dstune plan --cal", ["--calibrate"]),
        ("dstune evaluate runs/x --sh", ["--shell-completion", "--shots"]),
        ("dstune generate runs/x --top", ["--top-k", "--top-p"]),
        ("dstune generate runs/x trainer.ep", []),
        ("dstune export runs/x --gguf ", [*sorted(GGUF_TYPES)]),
        ("dstune checkpoints runs/x --ver", ["--verify"]),
        ("dstune import --fr", ["--from"]),
        ("dstune models --pr", ["--probe"]),
        ("dstune doctor --no", ["--no-allreduce"]),
        ("dstune runs --so", ["--sort"]),
        ("dstune cancel --no", ["--now"]),
        ("dstune train schem", []),
        ("dstune train hydr", []),
    ],
)
def test_completion(line: str, expected: list[str]):
    assert complete(line, VERBS) == expected


def test_completion_of_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "rows").mkdir()
    assert complete("dstune train data.train=ro", VERBS) == ["data.train=rows.jsonl", "data.train=rows/"]
    assert complete("dstune evaluate ro", VERBS) == ["rows.jsonl", "rows/"]


def test_completion_knows_groups_of_a_config_dir(tmp_path: Path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("defaults: [lora, _self_]\n")
    assert complete(f"dstune train --config-dir {tmp_path} method=mine method.alpha", VERBS) == [
        "method.alpha=",
        "method.alpha_pattern=",
    ]


@pytest.mark.parametrize(("shell", "separator"), [("bash", " "), ("zsh", "\n"), ("fish", "\n")])
def test_query(shell: str, separator: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COMP_LINE", "dstune train model")
    assert printed(capsys, "--shell-completion", f"query={shell}") == f"model.{separator}model=\n"


def test_uninstall_and_wrong_requests(capsys: pytest.CaptureFixture[str]):
    assert "unset hydra_bash_completion" in printed(capsys, "-sc", "uninstall=bash")
    assert "compdef -d dstune" in printed(capsys, "-sc", "uninstall=zsh")
    assert "complete -c dstune" in printed(capsys, "-sc", "install=fish")
    assert "bash, fish, zsh" in refused("-sc", "install=csh").problems[0].reason
    assert "install=" in refused("-sc").problems[0].reason


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_behind_the_verb(tmp_path: Path):
    """The installed script, driven as bash drives it when TAB is pressed."""
    root = Path(__file__).parents[2]
    program = tmp_path / "dstune"
    program.write_text(f"#!{sys.executable}\nimport sys\nfrom dstune.cli import main\nsys.exit(main())\n")
    program.chmod(0o755)
    script = """
eval "$(dstune -sc install=bash)"
complete -p dstune
COMP_LINE="dstune train experiment=s"; COMP_POINT=${#COMP_LINE}; COMP_CWORD=2; COMP_WORDS=(dstune train experiment=s)
hydra_bash_completion
echo "REPLY ${COMPREPLY[*]}"
"""
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(root)}
    run = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "-F hydra_bash_completion dstune" in run.stdout
    assert (
        run.stdout.splitlines()[-1]
        == "REPLY experiment=sentiment experiment=sentiment_ulmfit experiment=smollm2_compressed"
    )
