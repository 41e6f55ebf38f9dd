"""What the plan counts of a second copy of the weights in each node, and when `zero.stage=auto` takes it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dstune.config.compose import compose
from dstune.config.schema import ZeroConfig
from dstune.config.validate import find_problems
from dstune.config.zero_rules import copy_ranks
from dstune.planning.hardware import Cluster, parse
from dstune.planning.memory import memory
from dstune.planning.plan import with_copies
from dstune.planning.setup import Setup
from dstune.planning.stage import choose_planned_stage, setup_on
from dstune.planning.time import communication, sent_for_copies, speed_of, step_time

RUN = ["model=llama3_8b", "data.train=rows.jsonl", "task=chat", "trainer.global_batch_size=256"]
SLOW = parse("8xL40S", {}, 4)
"""Four nodes with a network of 12.5 GB/s for each device, and 32 GB/s within a node."""


def setups(cluster: Cluster, *overrides: str) -> tuple[Setup, Setup]:
    """The run at stage 3 without and with copies."""
    without = setup_on(compose([*RUN, "zero=stage3", *overrides]).config, cluster)[0]
    with_them = setup_on(compose([*RUN, "zero=stage3", "zero.hpz=true", *overrides]).config, cluster)[0]
    return without, with_them


def test_a_copy_takes_the_weights_of_a_node_shared_by_its_ranks() -> None:
    without, with_them = setups(SLOW)
    assert with_them == replace(without, copy_ranks=8)
    copied = memory(with_them).parts["copy in the node"]
    assert copied == 8_030_261_248 * 2 // 8
    assert "copy in the node" not in memory(without).parts


@pytest.mark.parametrize("method", ["full", "lora"])
def test_only_what_an_update_changes_is_gathered_from_other_nodes(method: str) -> None:
    without, with_them = setups(SLOW, f"method={method}", "trainer.micro_batch_size=4")
    count, trained, around = without.micro_batches, without.trained_count * 2, 31 / 32
    assert count == 2
    weights = without.frozen_bytes + trained
    assert communication(without) == pytest.approx(around * count * (2 * weights + trained))
    assert communication(with_them) == pytest.approx(around * (1 + count) * trained)
    inside = 7 / 8 * (2 * count * with_them.frozen_bytes + (2 * count - 1) * trained)
    assert sent_for_copies(with_them) == pytest.approx(inside)
    assert sent_for_copies(without) == 0


def test_faster_by_the_difference_of_the_links() -> None:
    without, with_them = setups(SLOW)
    speed = speed_of(SLOW, 2)
    assert step_time(with_them, speed).seconds < step_time(without, speed).seconds
    even = replace(speed, node_link=speed.link / 100)
    assert step_time(with_them, even).seconds > step_time(without, even).seconds


@pytest.mark.parametrize(
    ("ranks", "per_node", "expected"),
    [(32, 8, 8), (8, 8, 1), (4, 1, 1), (12, 8, 1), (1, 1, 1)],
    ids=["four nodes", "one node", "a rank a node", "uneven nodes", "one rank"],
)
def test_where_there_are_copies(ranks: int, per_node: int, expected: int) -> None:
    assert copy_ranks(ZeroConfig(stage=3, hpz=True), ranks, per_node) == expected
    assert copy_ranks(ZeroConfig(stage=3), ranks, per_node) == 1
    assert copy_ranks(ZeroConfig(stage=2, hpz=True), ranks, per_node) == 1


def test_the_stage_is_chosen_with_copies_where_the_network_is_slow() -> None:
    run = compose([*RUN, "trainer.micro_batch_size=4", "zero.stage=auto"]).config
    slow, why = choose_planned_stage(run, SLOW)
    assert (slow.zero.stage, slow.zero.hpz) == (3, True)
    assert "3 hpz" in why
    one_node, _ = choose_planned_stage(run, parse("8xH100-80G", {}, 1))
    assert not one_node.zero.hpz
    narrow = replace(SLOW, device=replace(SLOW.device, memory_gib=33.0))
    less, _ = choose_planned_stage(run, narrow)
    assert (less.zero.stage, less.zero.hpz) == (3, False)  # there is no room for a copy


def test_no_copies_of_weights_in_host_memory() -> None:
    without, _ = setups(SLOW)
    assert [setup.copy_ranks for setup in with_copies(replace(without, offload_param=True))] == [1]
    assert [setup.copy_ranks for setup in with_copies(replace(without, stage=2))] == [1]
    assert [setup.copy_ranks for setup in with_copies(without)] == [1, 8]


def test_what_cannot_have_copies_is_refused() -> None:
    config = compose([*RUN, "zero=stage3"]).config
    below = replace(config, zero=replace(config.zero, stage=2, hpz=True))
    assert [problem.where for problem in find_problems(below)] == ["zero.hpz"]
    open_stage = compose([*RUN, "zero.stage=auto", "zero.hpz=true"]).config
    assert choose_planned_stage(open_stage, SLOW)[0].zero.stage == 3
