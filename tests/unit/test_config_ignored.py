"""A setting of the command line that nothing looks at is told, with what would let it count."""

from __future__ import annotations

import shlex

import pytest

from dstune.config.compose import compose
from dstune.config.ignored import ignored_in_sweep, ignored_settings
from dstune.config.run_overrides import apply_overrides

CHAT = ["data=chitchat"]


def ignored(*overrides: str) -> dict[str, str]:
    return {problem.where: problem.fix for problem in ignored_settings(compose(overrides).config, overrides)}


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["experiment=quickstart", "trainer.epochs=2"], "trainer.epochs"),
        ([*CHAT, "trainer.max_steps=3", "trainer.epochs=2"], "trainer.epochs"),
        ([*CHAT, "schedule.warmup_steps=3", "schedule.warmup_ratio=0.1"], "schedule.warmup_ratio"),
        ([*CHAT, "data.validation=x.jsonl", "data.split.validation=0.1"], "data.split.validation"),
        ([*CHAT, "data.test=x.jsonl", "data.split.test=0.1"], "data.split.test"),
        ([*CHAT, "trainer.length_grouping=false"], "trainer.length_grouping"),
        ([*CHAT, "zero=stage0", "zero.reduce_bucket_size=5"], "zero.reduce_bucket_size"),
        ([*CHAT, "zero=stage1", "zero.overlap_comm=false"], "zero.overlap_comm"),
        ([*CHAT, "zero=stage2", "zero.param_persistence_threshold=5"], "zero.param_persistence_threshold"),
        (["data.train=x.jsonl", "task=causal_lm", "model.chat_template=x.jinja"], "model.chat_template"),
        ([*CHAT, "evaluate.max_new_tokens=5"], "evaluate.max_new_tokens"),
        ([*CHAT, "tracking.wandb.entity=me"], "tracking.wandb.entity"),
        ([*CHAT, "data.stream_rows=5"], "data.stream_rows"),
        ([*CHAT, "data.augment.synonym_share=0.5"], "data.augment.synonym_share"),
        ([*CHAT, "data.augment.temperature=0"], "data.augment.temperature"),
        ([*CHAT, "data.augment.seed=1"], "data.augment.seed"),
        (["data.train=x.jsonl", "data.mixture={a: {path: y.jsonl}}"], "data.train"),
    ],
)
def test_an_overruled_setting_is_reported_and_its_fix_lets_it_count(overrides: list[str], key: str):
    found = ignored(*overrides)
    assert list(found) == [key]
    if "=" in found[key]:
        fix = shlex.split(found[key])
        others = [text for text in overrides if text.split("=")[0] not in {setting.split("=")[0] for setting in fix}]
        assert key not in ignored(*others, *fix)


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=quickstart"],  # what files hold is not judged
        [*CHAT, "trainer.epochs=2"],
        [*CHAT, "trainer.max_steps=2"],
        [*CHAT, "data.packing=false", "trainer.length_grouping=false"],
        [*CHAT, "zero=stage3", "zero.param_persistence_threshold=5", "zero.overlap_comm=false"],
        [*CHAT, "evaluate.samples=1", "evaluate.max_new_tokens=5"],
        [*CHAT, "evaluate.safety=true", "evaluate.canaries=planted.jsonl"],
    ],
)
def test_settings_that_count_are_not_reported_as_ignored(overrides: list[str]):
    assert ignored(*overrides) == {}


def test_only_this_command_is_judged():
    run = compose([*CHAT, "trainer.max_steps=3", "trainer.epochs=2"]).config
    assert ignored_settings(apply_overrides(run, ["trainer.max_steps=4"]), ["trainer.max_steps=4"]) == []


def test_a_run_that_exists_is_not_advised_what_it_refuses():
    overrides = [*CHAT, "trainer.max_steps=3", "trainer.epochs=2"]
    [problem] = ignored_settings(compose(overrides).config, ["trainer.epochs=2"], continues=True)
    assert problem.fix == "leave it out"  # trainer.max_steps=null would change the unit of its length


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        (["sweep.pruner=median", "sweep.trials=4"], "sweep.startup_trials=1"),
        (["sweep.pruner=median", "sweep.trials=9"], None),
        (["sweep.pruner=median", "sweep.trials=4", "sweep.startup_trials=2"], None),
        (["sweep.pruner=asha", "sweep.trials=2"], "sweep.trials=12"),
        (["sweep.pruner=asha", "sweep.trials=4"], None),
        (["sweep.trials=4"], None),
    ],
)
def test_a_pruner_that_can_end_no_trial_is_warned_about(given: list[str], fix: str | None):
    words = [*CHAT, "sweep=optuna", "evaluate.every=10", *given]
    found = {problem.where: problem.fix for problem in ignored_in_sweep(compose(words).config, words)}
    assert found.get("sweep.pruner") == fix
