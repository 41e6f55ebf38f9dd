"""What is said before the first step of what is allowed and probably not meant."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dstune.config.compose import compose
from dstune.planning.fillers import fillers
from dstune.rank.startup import cautions, label_counts, unprinted_tokens
from dstune.trainer.state import TrainState

REPORT = {"train": {"rows": 40, "truncated": 38, "longest": 80}, "validation": {"rows": 2, "truncated": 0}}


def startup_messages(
    *overrides: str,
    report: dict | None = None,
    steps: int = 100,
    state: TrainState | None = None,
    held_out: int = 100,
    module: nn.Module | None = None,
    lengths: Sequence[int] = (8,),
) -> list[str]:
    config = compose(["data=chitchat", *overrides]).config
    train = SimpleNamespace(lengths=np.array(lengths))
    data = SimpleNamespace(report=report or {}, train=train, validation=SimpleNamespace(lengths=[8] * held_out))
    engine = SimpleNamespace(module=module or nn.Linear(2, 2))
    world = SimpleNamespace(size=1, local_size=1)
    data_loader = SimpleNamespace(rows=lambda: 16 * steps, steps=lambda epochs: steps * epochs)
    run = SimpleNamespace(
        config=config,
        data=data,
        total_steps=steps,
        state=state or TrainState(step=1),  # of a run that goes on, few steps are not told
        engine=engine,
        world=world,
        data_loader=data_loader,
        epochs=1.0,
    )
    return list(cautions(config, run))


def test_rows_that_were_cut_are_counted() -> None:
    (line,) = startup_messages("data.max_length=64", report=REPORT)
    assert line.startswith(
        "38 of 40 train rows are longer than data.max_length=64 and were cut (the longest has 80 tokens"
    )
    # This task splits long rows: nothing is lost.
    assert startup_messages("task=causal_lm", "data=files", "data.train=x.jsonl", report=REPORT) == []


def test_rows_beyond_rotary_positions_are_counted() -> None:
    """They train, at positions that the model has never seen."""
    from transformers import GPT2Config, LlamaConfig

    module = nn.Linear(2, 2)
    module.config = LlamaConfig(max_position_embeddings=64)  # type: ignore[assignment]
    (line,) = startup_messages(module=module, lengths=[64, 65, 90])
    assert line.startswith(
        "2 of 3 train rows are longer than the 64 positions that the model was made for (the longest has 90 "
    )
    assert "data.max_length=64, or extend" in line
    assert not startup_messages(module=module, lengths=[64])
    assert not startup_messages("model.rope.type=dynamic", module=module, lengths=[90])
    module.config = GPT2Config()  # type: ignore[assignment]  # with another name for learned positions, to which rows are cut
    assert not startup_messages(module=module, lengths=[1024])


def test_added_tokens_that_no_sample_has_are_named() -> None:
    from datasets import Dataset

    config = compose(["data=chitchat", "model.add_tokens=[TOOL,PLAN]"]).config
    table = Dataset.from_dict({"input_ids": [[1, 2]], "rejected_input_ids": [[3]], "labels": [[7, 7]]})
    run = SimpleNamespace(
        config=config, data=SimpleNamespace(train=SimpleNamespace(table=table)), world=SimpleNamespace(is_main=True)
    )
    ids = {"TOOL": 3, "PLAN": 7}
    (line,) = unprinted_tokens(run, SimpleNamespace(convert_tokens_to_ids=ids.get))
    assert line.startswith("none of the first 1 train samples has PLAN of model.add_tokens")
    assert not list(unprinted_tokens(run, SimpleNamespace(convert_tokens_to_ids={"TOOL": 3, "PLAN": 1}.get)))


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (["method=lora"], False),
        (["method=lora", "optimizer.lr=2e-5"], True),
        (["method=qlora", "optimizer.lr=5e-5"], True),
        (["method=lora", "optimizer.lr=2e-4"], False),
        (["method=full"], False),
        (["method=lora", "task=preference", "data=files", "data.train=x.jsonl"], False),
    ],
)
def test_a_rate_for_all_weights_is_slow_for_adapters(overrides: list[str], warned: bool) -> None:
    assert [("without optimizer.lr: 0.0002" in line) for line in startup_messages(*overrides)] == [True] * warned


@pytest.mark.parametrize(
    ("overrides", "ranks", "pattern"),
    [
        ("global_batch_size=4 micro_batch_size=4", 2, "1 of the 2 micro-batches .*trainer.micro_batch_size=2 does"),
        ("global_batch_size=8 micro_batch_size=3", 2, "1 of the 4 micro-batches .*trainer.micro_batch_size=2 does"),
        ("global_batch_size=6 micro_batch_size=1", 4, "2 of the 8 micro-batches .*trainer.global_batch_size=8 does"),
        ("global_batch_size=8 micro_batch_size=4", 2, None),
        ("global_batch_size=31 micro_batch_size=1", 32, None),  # 3%
        ("global_batch_size=8 micro_batch_size=4 parallel=ulysses parallel.size=2", 4, None),  # two groups of two
    ],
)
def test_micro_batches_that_count_for_nothing_are_reported(overrides: str, ranks: int, pattern: str | None) -> None:
    given = [word if "=" in word and "parallel" in word else f"trainer.{word}" for word in overrides.split()]
    found = list(fillers(compose(["data=chitchat", *given]).config, ranks))
    assert len(found) == (pattern is not None)
    if pattern:
        assert re.search(pattern, found[0]), found[0]


@pytest.mark.parametrize("ranks", [2, 3, 6, 8])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_what_is_advised_leaves_none(ranks: int, rows: int) -> None:
    composed = compose(["data=chitchat"]).config
    for of_step in range(rows, 25):
        trainer = replace(composed.trainer, global_batch_size=of_step, micro_batch_size=rows)
        config = replace(composed, trainer=trainer)
        for line in fillers(config, ranks):
            key, value = re.search(r"\(trainer\.(\w+)=(\d+) does\)", line).groups()
            advised = replace(config, trainer=replace(config.trainer, **{key: int(value)}))
            assert list(fillers(advised, ranks)) == [], line


def test_few_held_out_rows_are_reported() -> None:
    assert startup_messages(held_out=20) == []
    (line,) = startup_messages(held_out=1)
    assert line.startswith("1 validation row: metrics of so few say little")


def test_experts_without_adapters_are_reported() -> None:
    experts = nn.Module()
    experts.register_parameter("down_proj", nn.Parameter(torch.zeros(3, 2, 2)))
    mixture = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts, "gate": nn.Linear(2, 2, bias=False)})})
    (line,) = startup_messages("method=lora", "optimizer.lr=2e-4", module=mixture)
    assert line.startswith("the experts, 75% of the weights, have no adapters")
    assert startup_messages("method=lora", "optimizer.lr=2e-4", "method.target_modules=[q_proj]", module=mixture) == []


def test_early_stopping_without_evaluations_between_is_reported() -> None:
    patient = ["trainer.early_stopping.patience=3", "evaluate.every=50"]
    (line,) = startup_messages(*patient, steps=4)
    assert "4 steps and evaluate.every=50" in line
    assert startup_messages(*patient, steps=51) == []


def test_a_stretched_schedule_is_reported() -> None:
    ended = TrainState(step=100, planned_steps=100)
    linear = ["schedule=linear", "optimizer.lr=1e-3", "schedule.warmup_ratio=0"]
    (line,) = startup_messages(*linear, steps=200, state=ended)
    assert line.startswith("the run has 200 steps now instead of 100") and "goes on at 0.0005 instead of 1e-05" in line
    assert startup_messages(*linear, steps=100, state=TrainState(step=50, planned_steps=100)) == []
    assert startup_messages("schedule=constant", steps=200, state=ended) == []
    assert startup_messages(*linear, steps=200) == []  # a first start


def test_labels_are_counted_and_misspelt_ones_named() -> None:
    counts = {"Bug": 1, "account": 65, "billing": 63, "billling": 2, "bug": 56, "cat": 1, "bat": 50}
    assert label_counts(counts).startswith("7 labels: account 65, billing 63, bug 56, bat 50, billling 2")
    assert label_counts({str(number): 1 for number in range(30)}).endswith(" and 18 more")
    lines = startup_messages(report={"train": {"rows": 238, "labels": counts}})
    assert lines == [
        "the labels 'Bug' (1 training row) and 'bug' (56 training rows) differ by case only",
        "the labels 'billling' (2 training rows) and 'billing' (63 training rows) differ by one character only",
        "the label 'Bug' has one training row",
        "the label 'cat' has one training row",
    ]
    assert startup_messages(report={"train": {"rows": 9, "labels": {"bug": 3, "cat": 6}}}) == []
    many = startup_messages(report={"train": {"rows": 30, "labels": {f"name {number}": 1 for number in range(30)}}})
    assert len(many) == 13 and many[-1].startswith("18 more labels look like a slip")


def test_columns_that_are_not_used_are_reported() -> None:
    assert startup_messages(report={"train": {"rows": 9, "unread_columns": {"context": 7}}}) == [
        "the column 'context' of 7 train rows is not used; data.columns says which columns are"
    ]


def test_bad_rows_are_counted_for_each_file() -> None:
    report = {part: {"rows": 190, "rows_read": 200, "bad_rows": 10} for part in ("train", "validation")}
    (line,) = startup_messages("data.on_bad_row=skip", report=report)
    assert line == "10 of 200 rows of data.train are bad and left out (data_report.json names the first)"
    assert len(startup_messages("data.on_bad_row=skip", "data.validation=y.jsonl", report=report)) == 2
