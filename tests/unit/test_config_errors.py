"""What a wrong command line is answered with: every mistake, each with key, value, reason and nearest valid name."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstune.config.compose import compose
from dstune.config.hydra_session import config_folder
from dstune.config.names import all_keys, suggest_key
from dstune.config.run_overrides import apply_overrides
from dstune.core.errors import Problem, UserError
from dstune.launch.slurm.config import SlurmConfig


def problems(*overrides: str, config_dirs: tuple[Path, ...] = ()) -> list[Problem]:
    with pytest.raises(UserError) as caught:
        compose(list(overrides), config_dirs)
    return caught.value.problems


@pytest.mark.parametrize(
    ("override", "where", "value", "reason", "fix"),
    [
        # names
        ("method=lorra", "method", "lorra", "no such method", "method=lora"),
        ("methd=lora", "methd", "lora", "no such group", "method=lora"),
        ("experiment=zzz", "experiment", "zzz", "no such experiment", "quickstart"),
        ("experiment=8", "experiment", "8", "no such experiment", "quickstart"),
        ("trainer.max_step=3", "trainer.max_step", "3", "no such key", "trainer.max_steps=3"),
        ("max_steps=3", "max_steps", "3", "no such key", "trainer.max_steps=3"),
        ("trainer.lr=3", "trainer.lr", "3", "no such key", "optimizer.lr=3"),
        ("learning_rate=3", "learning_rate", "3", "no such key", "optimizer.lr=3"),
        ("bf16=true", "bf16", "true", "no such key", "trainer.precision=bf16"),
        ("trainer.early_stopping.patienc=3", "trainer.early_stopping.patienc", "3", "no such key", "patience=3"),
        ("method.rank=8", "method.rank", "8", "method=full has no such key", "method=lora"),
        ("schema/method=lora", "schema/method", "lora", "no such group", "method"),
        ("task.name=chat", "task.name", "chat", "name of the group", "task=chat"),
        ("zzz=1", "zzz", "1", "no such key", "--help"),
        # types
        ("trainer.max_steps=abc", "trainer.max_steps", "abc", "whole number", ""),
        ("trainer.max_steps=1e3", "trainer.max_steps", "1000.0", "whole number", "trainer.max_steps=1000"),
        ("trainer.epochs=null", "trainer.epochs", "null", "whole number", ""),
        ("optimizer.lr=high", "optimizer.lr", "high", "a number", ""),
        ("trainer.precision=bf-16", "trainer.precision", "bf-16", "auto, fp32, bf16, fp16", "trainer.precision=bf16"),
        ("trainer.precision=bfloat16", "trainer.precision", "bfloat16", "auto, fp32", "trainer.precision=bf16"),
        (
            "trainer.activation_checkpointing=Selective",
            "trainer.activation_checkpointing",
            "Selective",
            "true or false or selective",
            "trainer.activation_checkpointing=selective",
        ),
        ("data.format=openai", "data.format", "openai", "messages", "data.format=messages"),
        ("data.packing=maybe", "data.packing", "maybe", "true or false", ""),
        ("tracking.tags=a", "tracking.tags", "a", "list", "tracking.tags=[a]"),
        ("data.columns=text", "data.columns", "text", "mapping", ""),
        ("optimizer.betas=[0.9]", "optimizer.betas", "[0.9]", "two numbers", ""),
        ("optimizer.betas=[0.9,x]", "optimizer.betas[1]", "x", "a number", ""),
        ("run=foo", "run", "foo", "section", "run.name"),
        ("trainer={max_steps: x}", "trainer.max_steps", "x", "whole number", ""),
        ("method=null", "method", "null", "needs a choice", "lora"),
        # grammar
        ("lora", "lora", "", "KEY=VALUE", "method=lora"),
        ("trainer", "trainer", "", "KEY=VALUE", "trainer.KEY=VALUE"),
        ("max_steps", "max_steps", "", "KEY=VALUE", "trainer.max_steps=VALUE"),
        ("", "''", "", "KEY=VALUE", ""),
        ("run.dir=/a=b", "run.dir", "/a=b", "meaning in Hydra", "'run.dir=\"/a=b\"'"),
        ("tracking.tags=[a", "tracking.tags", "[a", "bracket", ""),
        ("trainer.seed=1,2", "trainer.seed", "1,2", "sweep", "trainer.seed=1"),
        # what Hydra has and dstune does not
        ("hydra.run.dir=x", "hydra.run.dir", "x", "hydra.searchpath", "run.dir"),
        ("hydra/launcher=joblib", "hydra/launcher", "joblib", "runs sweeps itself", "launch=local"),
        ("hydra.sweeper.n_trials=9", "hydra.sweeper.n_trials", "9", "runs sweeps itself", "sweep.trials=9"),
        ("hydra/sweeper=optuna", "hydra/sweeper", "optuna", "runs sweeps itself", "sweep=optuna with --multirun"),
        (
            "hydra.sweeper.direction=maximize",
            "hydra.sweeper.direction",
            "maximize",
            "runs sweeps itself",
            "sweep.objective",
        ),
        ("hydra.searchpath=[/does/not/exist]", "hydra.searchpath", "", "/does/not/exist", ""),
        ("~trainer.seed", "trainer.seed", "", "cannot be removed", ""),
        ("~method", "method", "", "cannot be removed", "full|"),
        ("+trainer.seed=3", "trainer.seed", "3", "exists already", "trainer.seed=3"),
        ("+method=lora", "method", "lora", "already has a choice", "method=lora"),
    ],
)
def test_a_wrong_override_names_key_value_reason_and_fix(override: str, where: str, value: str, reason: str, fix: str):
    [problem] = problems("data=chitchat", override)
    assert (problem.where, problem.value) == (where, value)
    assert reason in problem.reason
    assert fix in problem.fix


def test_keys_of_a_group_with_a_wrong_choice_are_not_checked_against_another_choice():
    found = problems("data=chitchat", "method=lorra", "method.rank=3", "method.rnk=3")
    assert [problem.where for problem in found] == ["method", "method.rnk"]


def test_a_removed_entry_and_a_correct_plus_are_no_problem():
    config = compose(["data=chitchat", "+data.columns.text=a", "++trainer.seed=3", "~data.columns.text"]).config
    assert (config.data.columns, config.trainer.seed) == ({}, 3)


@pytest.mark.parametrize(
    ("file", "content", "chosen", "where", "reason", "fix"),
    [
        (
            "experiment/a",
            "# @package _global_\nrun: {nme: x}",
            "experiment=a",
            "experiment/a.yaml",
            "run.nme",
            "run.name",
        ),
        ("experiment/a", "# @package _global_\ntrainer: {seed: x}", "experiment=a", "a.yaml", "trainer.seed=x", ""),
        ("experiment/a", "# @package _global_\nruns: 1", "experiment=a", "a.yaml", "runs", "run"),
        ("experiment/a", "# @package _global_\nrun: [", "experiment=a", "a.yaml:", "no YAML", ""),
        (
            "experiment/a",
            "# @package _global_\ndefaults:\n- override /method: lorra",
            "experiment=a",
            "method",
            "no such method",
            "lora",
        ),
        (
            "experiment/a",
            "# @package _global_\ndefaults:\n- override /methd: lora",
            "experiment=a",
            "a.yaml",
            "methd",
            "/method",
        ),
        ("experiment/a", "# @package _global_\nmethod: {rank: 1}", "experiment=a", "a.yaml", "method.rank", ""),
        ("experiment/a", '# @package _global_\nrun: {name: "${x.y}"}', "experiment=a", "run.name", "x.y", ""),
        ("model/a", "path: x\nrevsion: y", "model=a", "model/a.yaml", "model.revsion", "model.revision"),
        ("model/a", "- x", "model=a", "model/a.yaml", "mapping", ""),
        ("method/a", "rank: 3", "method=a", "method.name", "which method", "defaults"),
        ("method/a", "name: lora\nrnk: 3", "method=a", "method.rnk", "no such key", "method.rank"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, file: str, content: str, chosen: str, where: str, reason: str, fix: str):
    path = tmp_path / f"{file}.yaml"
    path.parent.mkdir()
    path.write_text(content + "\n")
    [problem] = problems("data=chitchat", chosen, config_dirs=(tmp_path,))
    assert where in problem.where
    assert reason in problem.reason
    assert fix in problem.fix


def test_a_file_that_a_packaged_one_would_win_over_is_refused(tmp_path: Path):
    (tmp_path / "launch").mkdir()
    file = tmp_path / "launch" / "slurm.yaml"
    file.write_text("defaults: [/schema/launch/slurm@_here_, _self_]\npartition: gpu\n")
    compose(["data=chitchat"], (tmp_path,))  # which does not choose it
    [problem] = problems("data=chitchat", "launch=slurm", config_dirs=(tmp_path,))
    assert problem.where == str(file)
    assert "launch=slurm chooses dstune's own" in problem.reason
    assert "launch/my_slurm.yaml" in str(problem.fix)
    own = (config_folder() / "launch" / "slurm.yaml").read_bytes()
    file.write_bytes(b"# Of an earlier version.\n" + own)  # a copy hides nothing
    assert compose(["data=chitchat", "launch=slurm"], (tmp_path,)).config.launch == SlurmConfig()
    file.write_text("defaults: [/schema/launch/slurm@_here_, _self_]\npartition: gpu\n")
    file.rename(tmp_path / "launch" / "my_slurm.yaml")
    launch = compose(["data=chitchat", "launch=my_slurm"], (tmp_path,)).config.launch
    assert isinstance(launch, SlurmConfig)
    assert launch.partition == "gpu"
    compose(["data=chitchat"], (Path(__file__).parents[2] / "conf",))  # the same files


@pytest.mark.parametrize("place", ["--config-dir", "hydra.searchpath"])
def test_files_that_would_have_no_effect_are_all_named(tmp_path: Path, place: str):
    (tmp_path / "trainer").mkdir()
    for name in ("train.yaml", "trainer/default.yaml"):
        (tmp_path / name).write_text("max_steps: 3\n")
    searched, folders = ([], (tmp_path,)) if place == "--config-dir" else ([f"{place}=[{tmp_path}]"], ())
    found = problems("data=chitchat", *searched, config_dirs=folders)
    assert {Path(problem.where).name: problem.fix for problem in found} == {
        "train.yaml": f"put its keys into {tmp_path}/experiment/NAME.yaml, which experiment=NAME chooses",
        "default.yaml": "rename it: as trainer/my_default.yaml it is chosen by trainer=my_default",
    }


def test_missing_config_dirs_are_all_named(tmp_path: Path):
    found = problems("data=chitchat", config_dirs=(tmp_path / "a", tmp_path / "b"))
    assert [problem.value for problem in found] == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_error_is_raised_without_hydra_s_exception_as_context():
    with pytest.raises(UserError) as caught:
        compose(["data=chitchat", "trainer.max_steps=abc"])
    assert caught.value.__cause__ is None
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("trainer.learning_rate", "optimizer.lr"),
        ("per_device_train_batch_size", "trainer.micro_batch_size"),
        ("evaluation.every", "evaluate.every"),
        ("modle.path", "model.path"),
        ("trainer.global_batch", "trainer.global_batch_size"),
        ("trainer.foo", None),
        ("foo.bar", None),
    ],
)
def test_suggestions(written: str, meant: str | None):
    assert suggest_key(written, all_keys()) == meant


def test_names_of_other_tools_lead_to_keys_that_exist():
    from dstune.config.names import OTHER_TOOLS

    assert set(OTHER_TOOLS.values()) <= set(all_keys())


# ---- names, types, ranges and rules together ----


TOGETHER = (  # a name, a type, a range, more than trainer.global_batch_size=16, what needs stage 3
    *("data=chitchat", "trainer.max_step=3", "optimizer.lr=high", "evaluate.samples=-1"),
    *("trainer.micro_batch_size=32", "zero=stage2", "zero.offload_param=cpu"),
)
WRONG = ("trainer.max_steps=abc", "method=lorra", "run.nme=x", "oops", "trainer.seed=1,2")


@pytest.mark.parametrize(
    ("overrides", "wrong"),
    [
        (["data=chitchat", *WRONG, "optimizer.lr=1e-4"], {word.partition("=")[0] for word in WRONG}),
        (TOGETHER, {word.partition("=")[0] for word in TOGETHER} - {"data", "zero"}),
        (["data.trian=x.jsonl", "task=chat"], {"data.trian"}),  # not: no training rows are given
        (["data=chitchat", "zero=stage0", "trainer.precison=bf16", "trainer.precision=bf16"], {"trainer.precison"}),
        (["data=chitchat", "task=classificaton"], {"task"}),  # not: the format does not fit task=chat
        (["experiment=zzz", "data.max_length=0"], {"experiment", "data.max_length"}),  # a range needs no context
        (["data=chitchat", "zero.stage=2", "zero.ofload_param=none", "zero.offload_param=cpu"], {"zero.ofload_param"}),
        (["data=chitchat", "oops", "zero=stage2", "zero.offload_param=cpu"], {"oops"}),  # it may have meant anything
        (["data=chitchat", "method=lorra", "trainer.seed=-1"], {"method", "trainer.seed"}),
    ],
)
def test_all_that_can_be_judged_is_reported_and_nothing_from_a_value_meant_otherwise(overrides, wrong):
    assert {problem.where for problem in problems(*overrides)} == wrong


def test_values_of_a_run_are_judged_together_too():
    run = compose(["data=chitchat", "zero=stage2"]).config
    with pytest.raises(UserError) as caught:
        apply_overrides(run, ["trainer.max_step=3", "evaluate.samples=-1", "zero.offload_param=cpu", "method=lora"])
    assert {problem.where for problem in caught.value.problems} == {
        "trainer.max_step",
        "evaluate.samples",
        "zero.offload_param",
        "method",
    }


def test_a_wrong_entry_of_a_mixture_does_not_hide_other_problems():
    found = problems("data.mixture={a: {path: x.jsonl, weigth: 2}}", "evaluate.samples=-1")
    assert {problem.where for problem in found} == {"data.mixture.a.weigth", "evaluate.samples"}
