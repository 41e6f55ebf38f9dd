"""`trainer.micro_batch_size=auto`: which size is chosen of what was measured, and on which rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from dstune.config.compose import compose, read_run, write_run
from dstune.config.convert import shown
from dstune.config.schema import Measured
from dstune.config.validate import find_problems
from dstune.errors import UserError
from dstune.evaluate import _with_rows
from dstune.train.micro_batch import Choice, Trial, choose, foreseen, longest_rows, told


def machine(weights: float, row: float, seconds: Callable[[int], float], tried: list[int]) -> Callable[[int], Trial]:
    """Whose micro-batches take `row` GiB a row beside the weights' GiB, and `seconds(rows)`."""

    def trial(rows: int) -> Trial:
        tried.append(rows)
        return Trial(rows, weights + row * rows, rows / seconds(rows))

    return trial


def test_the_largest_size_that_fits_is_never_exceeded_to_find_it() -> None:
    tried: list[int] = []
    # A GPU that hardly does more for 8 rows than for one.
    found = choose(machine(10, 1.5, lambda rows: 1 + 0.01 * rows, tried), 64, 10, 30)
    assert tried == [1, 2, 4, 8]
    assert (found.rows, found.ended) == (8, "16 would take about 34.0 GiB")


def test_a_size_that_is_hardly_faster_is_not_taken() -> None:
    tried: list[int] = []
    found = choose(machine(1, 0.1, lambda rows: max(1.0, rows / 4), tried), 64, 1, 30)
    assert tried == [1, 2, 4, 8]
    assert (found.rows, found.ended) == (4, "8 are hardly faster")


@pytest.mark.parametrize(
    ("share", "tried", "rows"),
    [(1, [1], 1), (3, [1, 2, 3], 3), (6, [1, 2, 4, 6], 6), (12, [1, 2, 4, 8, 12], 12)],
)
def test_a_ranks_rows_of_a_step_are_enough(share: int, tried: list[int], rows: int) -> None:
    seen: list[int] = []
    found = choose(machine(1, 0.1, lambda rows: 1.0, seen), share, 1, 30)
    assert (seen, found.rows) == (tried, rows)


def test_the_micro_batches_of_a_step_are_of_equal_size() -> None:
    """Of 12 rows, 8 at a time fit: two micro-batches either way."""
    assert choose(machine(10, 1, lambda rows: 1.0, []), 12, 10, 18.5).rows == 6


def test_one_row_is_the_least_even_where_it_leaves_too_little() -> None:
    tried: list[int] = []
    found = choose(machine(29, 2, lambda rows: 1.0, tried), 8, 29, 30)
    assert (tried, found.rows) == ([1], 1)


def test_memory_is_foreseen_on_the_line_through_the_last_two_sizes() -> None:
    one, two = Trial(1, 12, 1), Trial(2, 14, 1)
    assert foreseen([one], 2, 10) == 14  # what one row takes is taken for each row
    assert foreseen([one, two], 4, 10) == 18
    # Gradients take nearly all of what the first row takes: the line gets flatter.
    assert foreseen([Trial(1, 20, 1), Trial(2, 20.5, 1)], 4, 10) == 21.5
    assert foreseen([one, Trial(2, 11, 1)], 4, 10) == 11  # measured noise does not promise room


def test_what_was_measured_is_told() -> None:
    choice = Choice(2, (Trial(1, 1.25, 10), Trial(2, 1.5, 16)), "more than a rank has in a step")
    text = told(choice, 9.0)
    assert text.startswith("micro-batches of 2 rows (")
    assert "1: 10 rows/s in 1.25 GiB, 2: 16 rows/s in 1.50 GiB; more than a rank has" in text


def split(lengths: list[int]) -> SimpleNamespace:
    return SimpleNamespace(
        lengths=np.array(lengths, dtype=np.int32), weights=np.array(lengths, dtype=np.int64), sources=None
    )


def test_the_longest_rows_are_measured() -> None:
    config = compose(["data=chitchat", "data.packing=false", "trainer.global_batch_size=4"]).config
    assert longest_rows(config, split([3, 9, 5, 9, 1]), 2) == [(1,), (3,), (2,), (0,)]


def test_packed_rows_that_are_full_are_measured() -> None:
    overrides = ["data=chitchat", "data.packing=true", "data.max_length=16", "trainer.global_batch_size=4"]
    lengths = [10, 6, 8, 8, 12, 4, 3, 3] * 5
    rows = longest_rows(compose(overrides).config, split(lengths), 2)
    filled = [sum(lengths[sample] for sample in row) for row in rows]
    assert filled == sorted(filled, reverse=True)
    assert len(filled) == 4 and filled[0] == 16 and filled[-1] >= 12


# ---- as a value of the configuration ----


def test_it_is_kept_in_the_runs_file(tmp_path) -> None:
    composed = compose(["data=chitchat", "trainer.micro_batch_size=auto"])
    assert composed.config.trainer.micro_batch_size is Measured.auto
    assert composed.config.trainer.rows == 1
    write_run(tmp_path / "run.yaml", composed)
    assert "  micro_batch_size: auto\n" in (tmp_path / "run.yaml").read_text()
    assert read_run(tmp_path / "run.yaml").config == composed.config
    assert shown(Measured.auto) == "auto"


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
        (["trainer.deterministic=true"], "deterministic"),
    ],
)
def test_where_there_is_nothing_to_measure_a_number_is_asked_for(overrides: list[str], word: str) -> None:
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
