"""What a run has where nothing is said: the quickstart, a rate by method, a ZeRO stage by plan, evaluations and checkpoints that
happen; and a run of few steps that says so."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from support.configs import run_config

from dstune.config.cadence import cadence
from dstune.config.compose import compose
from dstune.config.data_schema import DataConfig
from dstune.config.resume import check_resume
from dstune.config.run_file import Composed, read_run, write_run
from dstune.config.schema import Automatic, TrainerConfig
from dstune.config.validate import allowed_stages, at_stage, find_problems
from dstune.core.errors import UserError
from dstune.launch import rundir, stages
from dstune.launch.plan import parse, plan_of
from dstune.planning.hardware import parse as hardware
from dstune.planning.stage import choose_planned_stage, is_open
from dstune.protocols import METHODS
from dstune.protocols.callback import Action
from dstune.rank import zero_stage
from dstune.rank.startup import few_steps
from dstune.rank.zero_stage import choose_zero_stage
from dstune.trainer.callbacks.cadence import Cadence

# ---- the rate ----


@pytest.mark.parametrize(
    ("overrides", "rate", "origin"),
    [
        (["data=chitchat"], 2e-5, "the default of method=full"),
        (["data=chitchat", "method=lora"], 2e-4, "the default of method=lora"),
        (["experiment=chat_lora"], 2e-4, "the default of method=lora"),
        (["data=chitchat", "method=qlora"], 2e-4, "the default of method=qlora"),
        (["experiment=dpo_lora"], 2e-5, "a tenth of 0.0002, the default of method=lora, for task=preference"),
        (["model=minilm", "task=classification", "data=sentiment", "method=head"], 1e-2, "the default of method=head"),
        (["data=chitchat", "method=lora", "optimizer.lr=3e-4"], 3e-4, None),
        (["experiment=sentiment", "method=lora"], 1e-4, None),  # the experiment's
        (["data=chitchat", "method=lora", "optimizer=sgd"], 1e-3, None),  # an optimizer with a rate of its own
    ],
)
def test_the_rate_is_the_method_s_where_nobody_gives_one(overrides: list[str], rate: float, origin: str | None) -> None:
    composed = compose(overrides)
    assert composed.config.optimizer.lr == rate
    assert composed.origins.get("optimizer.lr") == origin


def test_every_adapter_has_a_rate_above_that_of_all_weights() -> None:
    rates = {name: cls.learning_rate for name, cls in METHODS.classes().items()}
    assert rates["full"] == 2e-5
    assert all(rates[name] >= 2e-4 for name, cls in METHODS.classes().items() if cls.adapter)


def test_run_yaml_has_the_rate_with_its_origin_and_keeps_both(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_run(run / "run.yaml", compose(["data=chitchat", "method=lora", f"run.dir={run}"]))
    content = yaml.safe_load((run / "run.yaml").read_text())
    assert content["origins"] == {"optimizer.lr": "the default of method=lora"}
    assert content["config"]["optimizer"]["lr"] == 2e-4
    assert read_run(run / "run.yaml").origins == content["origins"]


def test_a_stored_run_keeps_the_rate_and_the_stage_that_it_began_with(tmp_path: Path) -> None:
    """As a run of an earlier version: 2e-5 under LoRA and stage 3, given by nobody."""
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    began = compose(["data=chitchat", "method=lora", f"run.dir={run}"])
    optimizer = replace(began.config.optimizer, lr=2e-5)
    config = replace(
        began.config,
        optimizer=optimizer,
        zero=replace(began.config.zero, stage=3),
        evaluate=replace(began.config.evaluate, every=0),
    )
    write_run(run / "run.yaml", Composed(config, began.overrides))
    again = rundir._continue_composed(read_run(run / "run.yaml"), compose(began.overrides))
    assert (again.config.optimizer.lr, again.config.zero.stage, again.config.evaluate.every) == (2e-5, 3, 0)
    assert again.origins == {}
    check_resume(config, again.config)


# ---- the ZeRO stage ----


def test_auto_is_the_default_and_rules_see_a_stage_that_they_allow() -> None:
    config = compose(["data=chitchat"]).config
    assert config.zero.stage is Automatic.auto
    assert find_problems(config) == []
    assert allowed_stages(compose(["data=chitchat", "zero.offload_param=cpu"]).config) == [3]
    assert allowed_stages(compose(["data=chitchat", "trainer.precision=bf16"]).config) == [1, 2, 3]
    sliced = compose(["data=chitchat", "parallel=tensor", "parallel.size=2"]).config
    assert allowed_stages(sliced) == [0, 1, 2] and find_problems(sliced) == []
    without_rows = compose(["model=llama3_8b", "data=files"]).config  # as `dstune plan` takes it
    assert find_problems(without_rows) != [] and allowed_stages(without_rows) == [0, 1, 2, 3]
    impossible = compose(["data=chitchat", "parallel=tensor", "parallel.size=2", "zero.offload_param=cpu"]).config
    assert find_problems(impossible) != []


@pytest.mark.parametrize(
    ("words", "devices", "stage"),
    [
        (["model=qwen3_0.6b"], "1xH100-80G", 1),  # one rank: all are as fast, and stage 0 would change the precision
        (["model=llama3_8b"], "8xH100-80G", 2),
        (["model=llama3_8b", "trainer.micro_batch_size=1", "trainer.activation_checkpointing=true"], "8xA100-40G", 3),
    ],
)
def test_the_stage_is_the_fastest_that_fits(words: list[str], devices: str, stage: int) -> None:
    config = compose([*words, "data=chitchat"]).config
    cluster = hardware(devices, {}, 1)
    chosen, why = choose_planned_stage(config, cluster)
    assert chosen.zero.stage == stage, why
    assert "fit" in why and "GiB a rank" in why
    found = plan_of(config, parse([f"hardware={devices}"]))
    assert (found.setup.stage, found.stage_origin) == (stage, why)  # `dstune plan` agrees
    at_others = {}
    for other in allowed_stages(config):
        configured = plan_of(at_stage(config, other), parse([f"hardware={devices}"])).plan.configured
        at_others[other] = configured.time.seconds if configured.fits else float("inf")
    assert at_others[stage] <= 1.05 * min(at_others.values())


def test_ranks_on_machines_that_are_not_known_choose_when_they_start() -> None:
    config = compose(["data=chitchat", "launch=slurm", "launch.nodes=2"]).config
    chosen, why = stages.choose(config, {})
    assert is_open(chosen) and why == stages.LATER
    only = compose(["data=chitchat", "launch=slurm", "launch.nodes=2", "zero.offload_param=cpu"]).config
    assert stages.choose(only, {})[0].zero.stage == 3


def test_named_hardware_decides_before_the_run_starts() -> None:
    words = ["model=llama3_8b", "data=chitchat", "launch=slurm", "launch.nodes=2", "launch.gpus=8"]
    config = compose([*words, "launch.hardware=8xH100"]).config
    chosen, why = stages.choose(config, {})
    planned = plan_of(compose(words).config, parse(["hardware=8xH100-80G", "nodes=2"]))
    assert (chosen.zero.stage, why) == (planned.setup.stage, planned.stage_origin)
    with pytest.raises(UserError) as error:
        stages.choose(compose([*words, "launch.hardware=8xnothing"]).config, {})
    assert [problem.where for problem in error.value.problems] == ["launch.hardware"]


@pytest.mark.parametrize("saved_ranks", [None, 16, 8])
def test_ranks_choose_the_stage_that_the_plan_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved_ranks: int | None
) -> None:
    """Two nodes of eight H100, by what rank 0 sees; a checkpoint of as many ranks keeps its stage."""
    monkeypatch.setattr(zero_stage, "accelerator", SimpleNamespace(
        present=lambda: True, name=lambda: "NVIDIA H100 80GB HBM3", current=lambda: None,
        memory=lambda device: (79 * 2**30, 79.2 * 2**30), capability=lambda: (9, 0),
    ))  # fmt: skip
    if saved_ranks:
        monkeypatch.setattr(zero_stage.store, "resumable", lambda run_dir: tmp_path / "step-00000004")
        monkeypatch.setattr(zero_stage.store, "read_state", lambda path: {"world_size": saved_ranks, "zero_stage": 1})
    world: Any = SimpleNamespace(size=16, local_size=8, is_main=True, broadcast=lambda value: value)
    config = compose(["model=llama3_8b", "data=chitchat", "launch=slurm", "launch.nodes=2"]).config
    chosen = choose_zero_stage(config, tmp_path, world).zero.stage
    planned = plan_of(config, parse(["hardware=8xH100-80G", "nodes=2"]))
    assert chosen == (1 if saved_ranks == 16 else planned.setup.stage)


# ---- how often ----


def due(every: int | str, total: int, epochs: float) -> list[int]:
    found, before = [], 0.0
    for step in range(1, total + 1):
        now = step * epochs / total
        if cadence(every).due(step, total, before, now):
            found.append(step)
        before = now
    return found


@pytest.mark.parametrize(
    ("every", "total", "epochs", "expected"),
    [
        (3, 10, 1.0, [3, 6, 9]),
        (0, 10, 1.0, []),
        ("auto", 4, 1.0, []),
        ("auto", 5, 1.0, [5]),
        ("auto", 12, 1.0, [5, 10]),
        ("auto", 100, 1.0, [25, 50, 75, 100]),
        ("25%", 2, 1.0, [1, 2]),
        ("25%", 10, 1.0, [3, 5, 8, 10]),
        ("25%", 100, 1.0, [25, 50, 75, 100]),
        ("100%", 7, 1.0, [7]),
        ("1 epoch", 9, 3.0, [3, 6, 9]),
        ("2 epochs", 12, 4.0, [6, 12]),
        ("0.5 epoch", 6, 1.0, [3, 6]),
        ("0.333333 epoch", 6, 1.0, [2, 4, 6]),
        ("1 epoch", 5, 0.5, []),
    ],
)
def test_steps_passes_and_shares_of_the_run(every: int | str, total: int, epochs: float, expected: list[int]) -> None:
    assert due(every, total, epochs) == expected
    assert cadence(every).times(total, epochs) == max(1, len({*expected, total}))


def test_evaluations_and_saves_happen_in_every_run_by_default() -> None:
    """`experiment=chat_lora` on 300 chats takes two steps."""
    config = compose(["experiment=chat_lora"]).config
    for total in (1, 2, 19, 1000):
        callback = Cadence(config, total, can_evaluate=True)
        actions = [
            callback.on_step_end(None, SimpleNamespace(number=step, epoch=step / total)).action
            for step in range(1, total + 1)
        ]
        evaluated = sum(bool(action & Action.EVALUATE) for action in actions)
        assert evaluated == (4 if total >= 19 else 1), "not after each step of a short run"
        assert sum(bool(action & Action.SAVE) for action in actions) == min(4, total)


def test_a_continued_run_counts_passes_from_its_checkpoint() -> None:
    config = compose(["data=chitchat", "checkpoint.every=1 epoch"]).config
    callback = Cadence(config, 9, can_evaluate=False)
    for step in (1, 2):
        callback.on_step_end(None, SimpleNamespace(number=step, epoch=step / 3))
    again = Cadence(config, 9, can_evaluate=False, begins=False)
    again.load_state_dict(callback.state_dict())
    assert again.on_step_end(None, SimpleNamespace(number=3, epoch=1.0)).action.value
    old = Cadence(config, 9, can_evaluate=False, begins=False)  # from a checkpoint that does not say
    assert not old.on_step_end(None, SimpleNamespace(number=2, epoch=2 / 3)).action.value
    assert old.on_step_end(None, SimpleNamespace(number=3, epoch=1.0)).action.value


@pytest.mark.parametrize("word", ["often", "1.5", "epoch", "0%", "101%", "-1 epoch", "true"])
def test_other_words_are_refused_with_what_is_possible(word: str) -> None:
    (problem,) = find_problems(compose(["data=chitchat", f"checkpoint.every={word}"]).config)
    assert problem.where == "checkpoint.every"
    assert all(way in problem.fix for way in ("=50", '"1 epoch"', "25%"))


def test_whole_numbers_stay_numbers(tmp_path: Path) -> None:
    write_run(tmp_path / "run.yaml", compose(["data=chitchat", "evaluate.every=50", "checkpoint.every=1 epoch"]))
    config = read_run(tmp_path / "run.yaml").config
    assert (config.evaluate.every, config.checkpoint.every) == (50, "1 epoch")
    with pytest.raises(UserError):
        compose(["data=chitchat", "evaluate.every=[1]"])


# ---- few steps ----


def reported(
    rows: int | None, samples: int, each: int, *, step: int = 0, packing: bool = False, cut: int = 0, **trainer: int
) -> list[str]:
    settings = TrainerConfig(**trainer)
    data = DataConfig(train="x.jsonl", packing=packing, max_length=1024)
    total = settings.max_steps or each * settings.epochs
    run = SimpleNamespace(
        state=SimpleNamespace(step=step),
        data_loader=SimpleNamespace(rows=lambda: rows, steps=lambda epochs: each * epochs),
        total_steps=total,
        data=SimpleNamespace(train=SimpleNamespace(lengths=[8] * samples), report={"train": {"rows": samples - cut}}),
    )
    return list(few_steps(run_config(trainer=settings, data=data), run))


def test_few_steps_of_a_mixture_whose_first_pass_has_no_row() -> None:
    assert "0 steps of" in reported(1, 8, 0, epochs=3)[0]


def test_few_steps_are_reported_with_their_arithmetic_and_what_to_change() -> None:
    (line,) = reported(rows=29, samples=285, each=2, packing=True)
    assert line == (
        "this run has only 2 optimizer steps (285 rows -> 29 packed rows of 1,024 tokens -> 2 steps of 16 rows in a pass), in "
        "which a model learns little: trainer.epochs=10, trainer.global_batch_size=1 or more rows give 20"
    )
    (line,) = reported(rows=100, samples=100, each=7, epochs=2)
    assert "14 optimizer steps (100 rows -> 7 steps of 16 rows in a pass, 2 passes)" in line
    assert "trainer.epochs=3, trainer.global_batch_size=11 or more rows give 20" in line
    (line,) = reported(rows=30, samples=30, each=2, cut=10)
    assert "(20 rows -> 30 samples -> 2 steps of 16 rows in a pass)" in line
    (line,) = reported(rows=100, samples=100, each=7, max_steps=10)
    assert "trainer.max_steps=10" in line
    (line,) = reported(rows=None, samples=0, each=1, max_steps=10)
    assert line.startswith("this run has only 10 optimizer steps (trainer.max_steps=10)")


def test_runs_of_twenty_steps_and_continued_ones_say_nothing() -> None:
    assert reported(rows=320, samples=320, each=20) == []
    assert reported(rows=32, samples=32, each=2, step=1) == []


def test_what_is_advised_gives_twenty_steps() -> None:
    for rows, epochs in product([5, 20, 41, 100, 300], [1, 2, 3, 7]):
        each = -(-rows // 16)
        for line in reported(rows=rows, samples=rows, each=each, epochs=epochs):
            words = dict(word.rstrip(",").split("=") for word in line.split() if word.startswith("trainer."))
            assert int(words["trainer.epochs"]) * each >= 20
            if batch := words.get("trainer.global_batch_size"):
                assert epochs * -(-rows // int(batch)) >= 20
