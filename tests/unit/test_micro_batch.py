"""`trainer.micro_batch_size=auto`: which size is chosen of what was measured, and on which rows."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dstune.config.compose import compose
from dstune.config.convert import format_value
from dstune.config.run_file import read_run, write_run
from dstune.config.schema import Automatic
from dstune.config.validate import find_problems
from dstune.core.errors import UserError
from dstune.evaluation.command import _with_rows
from dstune.trainer.memory import PeakMemory, give_back
from dstune.trainer.micro_batch import Trial, bound_peak_gib, choose, heaviest_rows
from dstune.zero.engine import Engine


def machine(
    peak: Callable[[int], float], seconds: Callable[[int], float], tried: list[int] | None = None
) -> Callable[[int], Trial]:
    """Whose micro-batches take `peak(rows)` GiB and `seconds(rows)`."""

    def trial(rows: int) -> Trial:
        if tried is not None:
            tried.append(rows)
        return Trial(rows, peak(rows), rows / seconds(rows))

    return trial


def constant(rows: int) -> float:
    return 1.0


def test_the_largest_size_that_fits_is_never_exceeded_to_find_it() -> None:
    tried: list[int] = []
    # A GPU that hardly does more for 8 rows than for one.
    found = choose(machine(lambda rows: 10 + 1.5 * rows, lambda rows: 1 + 0.01 * rows, tried), 64, 10, 30)
    assert tried == [1, 2, 4, 8]
    assert (found.rows, found.end_reason) == (8, "16 might take 34.0 GiB")


def test_a_peak_whose_reason_changes_is_not_exceeded_either() -> None:
    """The update takes 5 GiB, the backward pass 2 and 1 for each row: up to 3 rows that cannot be seen in the peak."""
    tried: list[int] = []
    found = choose(machine(lambda rows: max(5.0, 2.0 + rows), constant, tried), 64, 2, 8.2)
    assert (tried, found.rows) == ([1, 2, 4], 4)


def test_no_line_of_a_peak_lies_above_the_bound() -> None:
    rng = random.Random(0)
    for _ in range(500):
        held = rng.uniform(0, 50)
        lines = [(held + rng.choice([0, rng.uniform(0, 30)]), rng.uniform(0, 3)) for _ in range(4)]

        def peak(rows: int, lines: list[tuple[float, float]] = lines) -> float:
            return max(constant + slope * rows for constant, slope in lines)

        for rows in (1, 2, 4, 8):
            assert bound_peak_gib(Trial(rows, peak(rows), 1), 2 * rows, held) >= peak(2 * rows) - 1e-9


def test_what_gradients_and_states_take_is_not_taken_for_rows() -> None:
    """70 GiB that no row changes, on a device of 80: one row takes half a GiB, so 8 of them fit."""
    found = choose(machine(lambda rows: 70 + 0.5 * rows, constant), 64, 70, 75)
    assert found.rows == 8


def test_a_size_that_is_hardly_faster_is_not_taken() -> None:
    tried: list[int] = []
    found = choose(machine(lambda rows: 1 + 0.1 * rows, lambda rows: max(1.0, rows / 4), tried), 64, 1, 30)
    assert tried == [1, 2, 4, 8, 16]
    assert (found.rows, found.end_reason) == (4, "larger ones are hardly faster")


def test_one_disturbed_time_does_not_end_the_search() -> None:
    found = choose(machine(lambda rows: 1.0, lambda rows: 5.0 if rows == 2 else 1.0), 8, 1, 30)
    assert found.rows == 8


def test_a_size_that_took_more_than_there_may_be_is_not_chosen() -> None:
    found = choose(machine(lambda rows: {1: 2.0, 2: 3.0, 4: 9.0}[rows], constant), 64, 1, 8)
    assert (found.rows, found.end_reason) == (2, "4 took 9.0 GiB")


@pytest.mark.parametrize(
    ("share", "tried", "rows"), [(1, [1], 1), (3, [1, 2, 3], 3), (6, [1, 2, 4, 6], 6), (12, [1, 2, 4, 8, 12], 12)]
)
def test_a_ranks_rows_of_a_step_are_enough(share: int, tried: list[int], rows: int) -> None:
    seen: list[int] = []
    found = choose(machine(lambda rows: 1 + 0.1 * rows, constant, seen), share, 1, 30)
    assert (seen, found.rows) == (tried, rows)


def test_the_micro_batches_of_a_step_are_of_equal_size() -> None:
    """Of 12 rows, 8 at a time fit: two micro-batches either way."""
    assert choose(machine(lambda rows: 10.0 + rows, constant), 12, 10, 18.5).rows == 6


def test_one_row_is_the_least_even_where_it_leaves_too_little() -> None:
    tried: list[int] = []
    found = choose(machine(lambda rows: 29.0 + 2 * rows, constant, tried), 8, 29, 30)
    assert (tried, found.rows) == ([1], 1)


def split(lengths: list[int], targets: list[int] | None = None, **columns: list[int]) -> SimpleNamespace:
    tokens = {name: np.array(counts) for name, counts in (columns or {"input_ids": lengths}).items()}
    return SimpleNamespace(
        lengths=np.array(lengths, dtype=np.int32),
        weights=np.array(targets or lengths, dtype=np.int64),
        sources=None,
        tokens=lambda: tokens,
    )


UNPACKED = ["data=chitchat", "data.packing=false", "trainer.global_batch_size=4"]


def test_the_longest_row_is_measured_with_those_of_the_most_targets() -> None:
    config = compose(UNPACKED).config
    assert heaviest_rows(config, split([3, 9, 5, 8, 1], [3, 1, 5, 2, 1]), 3) == [(1,), (2,), (0,)]


def test_of_pairs_the_longest_of_either_side_is_measured() -> None:
    """Both sides are padded to it, though others are longer together."""
    pairs = split([16, 16, 13], [8, 8, 1], input_ids=[8, 8, 1], rejected_input_ids=[8, 8, 12])
    assert heaviest_rows(compose(UNPACKED).config, pairs, 2) == [(0,), (2,)]


def test_packed_rows_that_are_full_and_have_many_targets_are_measured() -> None:
    overrides = ["data=chitchat", "data.packing=true", "data.max_length=16", "trainer.global_batch_size=4"]
    lengths, targets = [10, 6, 8, 8, 12, 4, 16, 3], [1, 1, 8, 7, 1, 1, 2, 3]
    rows = heaviest_rows(compose(overrides).config, split(lengths, targets), 2)
    assert sum(lengths[sample] for sample in rows[0]) == 16
    assert sum(targets[sample] for sample in rows[1]) >= 8


def test_the_memory_of_a_trial_is_not_that_of_the_run() -> None:
    give_back()  # what other tests have left in the heap is no part of the level
    memory = PeakMemory()
    try:
        with memory.apart() as peak:
            block = torch.ones(64 * 2**20)  # 256 MiB, which glibc gives back
            within = peak()
            del block
        assert within > memory.gib + 0.2
        assert memory.now_gib < within - 0.2
    finally:
        memory.close()


@pytest.mark.parametrize(("stage", "state", "expected"), [(0, {}, 80), (0, {"made": 1}, 0), (2, {}, 0)])
def test_states_that_the_first_step_makes_are_counted(stage: int, state: dict, expected: int) -> None:
    """At stage 0: two moments of 4 bytes for each of 10 weights."""
    inner = SimpleNamespace(optimizer=SimpleNamespace(state=state))
    engine = SimpleNamespace(stage=stage, _engine=inner, _state_bytes=80.0)
    assert Engine.unallocated_state_bytes.fget(engine) == expected


# ---- as a value of the configuration ----


def test_it_is_kept_in_the_runs_file(tmp_path) -> None:
    composed = compose(["data=chitchat", "trainer.micro_batch_size=auto"])
    assert composed.config.trainer.micro_batch_size is Automatic.auto
    assert composed.config.trainer.rows == 1
    write_run(tmp_path / "run.yaml", composed)
    assert "  micro_batch_size: auto\n" in (tmp_path / "run.yaml").read_text()
    assert read_run(tmp_path / "run.yaml").config == composed.config
    assert format_value(Automatic.auto) == "auto"


@pytest.mark.parametrize("value", ["many", "1.5", "[2]", "null"])
def test_another_word_is_refused(value: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(["data=chitchat", f"trainer.micro_batch_size={value}"])
    (problem,) = caught.value.problems
    assert problem.where == "trainer.micro_batch_size"
    assert problem.reason == "expected a whole number or auto"


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["data.streaming=true", "data.train=x.jsonl", "trainer.max_steps=3"], "stream"),
        (["experiment=sentiment", "method=features"], "features"),
        (["experiment=sentiment", "method=importance"], "chosen before"),
        (["sweep.parallel=2"], "parallel trials"),
        (["trainer.deterministic=true"], "deterministic"),
    ],
)
def test_where_there_is_nothing_to_measure_a_number_is_requested(overrides: list[str], word: str) -> None:
    config = compose(["data=chitchat", *overrides, "trainer.micro_batch_size=auto"]).config
    (problem,) = [problem for problem in find_problems(config) if problem.where == "trainer.micro_batch_size"]
    assert word in problem.reason


def test_an_evaluation_takes_the_rows_that_its_run_has_found(tmp_path) -> None:
    config = compose(["data=chitchat", "trainer.micro_batch_size=auto"]).config
    assert _with_rows(config, tmp_path).trainer.rows == 1
    (tmp_path / "result.json").write_text(json.dumps({"micro_batch": {"rows": 8, "world_size": 2}}))
    assert _with_rows(config, tmp_path).trainer.micro_batch_size == 8
    given = compose(["data=chitchat", "trainer.micro_batch_size=2"]).config
    assert _with_rows(given, tmp_path) == given
