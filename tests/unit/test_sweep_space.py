"""Axes of a sweep: Hydra's grammar, spaces in files, and what is wrong with them."""

from __future__ import annotations

import pytest

from dstune.config.sweep_space import Axis, first, grid, short_names, split, with_space
from dstune.core.errors import UserError


def axes(*overrides: str) -> list[Axis]:
    return split(overrides, {}).axes


def values(*overrides: str) -> list[object]:
    (axis,) = axes(*overrides)
    return [value.plain for value in axis.values]


def test_choices_ranges_and_intervals():
    assert values("optimizer.lr=1e-5,1e-4") == [1e-5, 1e-4]
    assert values("method=full,lora") == ["full", "lora"]
    assert values("method.rank=choice(4,8)") == [4, 8]
    assert values("method.rank=range(4,13,4)") == [4, 8, 12]
    assert values("schedule.warmup_ratio=range(0.0,0.3,0.1)") == [0.0, 0.1, 0.2]
    assert values("data.slices=[a],[a,b]") == ["[a]", "[a,b]"]
    assert values("trainer.seed=1,1,2") == [1, 2], "a value that is given twice is one trial"
    (interval,) = axes("optimizer.lr=tag(log, interval(1e-5, 1e-3))")
    assert (interval.low, interval.high, interval.log, interval.integer) == (1e-5, 1e-3, True, False)
    assert interval.is_interval
    (whole,) = axes("method.rank=interval(4, 64)")
    assert whole.integer
    assert whole.value(12.0).text == "12"


def test_a_group_is_matched_by_pattern():
    found = split(["model=glob(smollm2*)"], {"model": ["minilm", "smollm2", "smollm2_360m"]})
    assert [value.text for value in found.axes[0].values] == ["smollm2", "smollm2_360m"]


def test_what_does_not_vary_stays():
    found = split(["experiment=sentiment", "data.slices=[a,b]", "optimizer.lr=1e-5,1e-4", "trainer.seed=[", "x"], {})
    assert found.fixed == ["experiment=sentiment", "data.slices=[a,b]", "trainer.seed=[", "x"]
    assert [axis.key for axis in found.axes] == ["optimizer.lr"]


def test_hydras_own_name_of_the_sweeper():
    assert split(["hydra/sweeper=optuna", "trainer.seed=1,2"], {}).fixed == ["sweep=optuna"]
    assert split(["hydra/sweeper=basic"], {}).fixed == ["sweep=grid"]


def test_every_combination_the_last_axis_fastest():
    found = [one.overrides for one in grid(axes("optimizer.lr=1e-5,1e-4", "method.rank=4,8"))]
    assert found == [
        ["optimizer.lr=1e-05", "method.rank=4"],
        ["optimizer.lr=1e-05", "method.rank=8"],
        ["optimizer.lr=0.0001", "method.rank=4"],
        ["optimizer.lr=0.0001", "method.rank=8"],
    ]
    assert first(axes("optimizer.lr=interval(0.1, 0.2)")).overrides == ["optimizer.lr=0.1"]


def test_values_go_back_to_the_command_line():
    """What an axis holds is parsed again as the same value."""
    for text in ("'a b','c,d'", "true,false", "null,3", "a-b/c,d.e", "[1,2],[3]", "{a:1},{b:2}"):
        (axis,) = axes(f"data.columns={text}")
        for value in axis.values:
            (again,) = axes(f"data.columns={value.text},other")
            assert again.values[0] == value


def test_short_names_are_whole_where_they_would_be_equal():
    assert short_names(axes("optimizer.lr=1,2", "method=a,b")) == {"optimizer.lr": "lr", "method": "method"}
    both = axes("data.split.seed=1,2", "trainer.seed=1,2")
    assert short_names(both) == {"data.split.seed": "data.split.seed", "trainer.seed": "trainer.seed"}


def test_a_space_in_a_file():
    space = {
        "optimizer": {"lr": [1e-5, 1e-4]},
        "method.rank": "range(4,9,4)",
        "model.path": ["org/a", "it's"],
        "trainer.seed": "1,2",
    }
    found = with_space(split(["trainer.seed=3"], {}), space, {})
    assert {axis.key: [value.plain for value in axis.values] for axis in found.axes} == {
        "optimizer.lr": [1e-5, 1e-4],
        "method.rank": [4, 8],
        "model.path": ["org/a", "it's"],
    }, "a value of the command line takes the place of the space's"


@pytest.mark.parametrize(
    ("override", "reason", "fix"),
    [
        ("optimizer.lr=interval(1e-3, 1e-5)", "from a smaller to a larger", "interval(1e-05,0.001)"),
        ("optimizer.lr=tag(log, interval(0, 1))", "above 0", "without the tag"),
        ("method.rank=interval(4, 8.5)", "whole numbers", "interval(4,9)"),
        ("method.rank=range(8,8)", "no value", "range(FROM,TO,STEP)"),
        ("trainer.seed=range(0,4,0)", "the step of a range must not be 0", "range(0,4,1)"),
        ("run.dir=a,b", "its own directory and name", "sweep.dir"),
        ("sweep.parallel=1,2", "about the sweep", "one value"),
        ("launch=local,slurm", "in the same way", "one value"),
        ("method.name=full,lora", "names the choice", "method=A,B"),
        ("model=glob(nothing*)", "no choice", "glob() is for groups"),
        ("hydra/sweeper=ax", "no such sweeper", "optuna"),
    ],
)
def test_what_is_no_axis(override: str, reason: str, fix: str):
    with pytest.raises(UserError) as error:
        split([override], {})
    (problem,) = error.value.problems
    assert reason in problem.reason
    assert fix in problem.fix
    assert problem.where == override.partition("=")[0]
    assert problem.value == override.partition("=")[2]


def test_all_mistakes_are_reported_together():
    with pytest.raises(UserError) as error:
        split(["run.name=a,b", "trainer.seed=1,2", "trainer.seed=3", "optimizer.lr=interval(2,1)"], {})
    assert [problem.where for problem in error.value.problems] == ["run.name", "optimizer.lr", "trainer.seed"]
    with pytest.raises(UserError) as error:
        with_space(split([], {}), {"trainer.seed": 3, "method.rank": [], "optimizer.lr": "interval(2,1)"}, {})
    places = ["sweep.space.trainer.seed", "sweep.space.method.rank", "sweep.space.optimizer.lr"]
    assert [problem.where for problem in error.value.problems] == places
