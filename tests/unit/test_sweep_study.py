"""`sweep=optuna`: asking, telling, pruning, and studies that are continued or shared."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dstune.config.schema import EvaluateConfig, RunConfig, TrainerConfig
from dstune.config.sweep_schema import OptunaConfig, Pruner, Sampler
from dstune.config.sweep_space import split
from dstune.core.errors import UserError
from dstune.launch import records
from dstune.launch.console import Console
from dstune.sweep import schedule
from dstune.sweep.devices import Slot
from dstune.sweep.directory import Sweep
from dstune.sweep.study import Study
from dstune.tracking.trials import Record, read_records
from tests.support.configs import run_config
from tests.support.sweeps import Scripted

optuna = pytest.importorskip("optuna")

SPACE = ("optimizer.lr=tag(log, interval(1e-4, 1e-1))", "method.rank=4,8")


def settings(**changes: Any) -> RunConfig:
    return run_config(
        sweep=OptunaConfig(**({"trials": 6, "startup_trials": 3} | changes)),
        evaluate=EvaluateConfig(every=1),
        trainer=TrainerConfig(max_steps=8),
    )


class Optuna(Scripted):
    """As `Scripted`, its values chosen by Optuna."""

    def study(self, config: RunConfig, *space: str, objectives: tuple[str, ...] = ("loss",)) -> Study:
        return Study(Sweep(self.path, config, [], [], split(space or SPACE, {}).axes), objectives)

    def go(self, config: RunConfig, *space: str, slots: int = 1, **more: Any) -> Study:
        study = self.study(config, *space, **more)
        places = [Slot(str(number), {"SLOT": str(number)}) for number in range(slots)]
        schedule.Schedule(self.path, study, places, [], Console(), self.received).run()
        return study


BOWL = """
import math
rate, rank = float(value), int(words["method.rank"])
result("completed", eval_final={"loss": (math.log10(rate) + 2) ** 2 + (rank == 4), "accuracy": rate}, seconds=rate)
"""


def test_values_come_from_the_space_and_the_best_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sweep = Optuna(tmp_path, BOWL, monkeypatch)
    study = sweep.go(settings(trials=12))
    found = read_records(sweep.path)
    assert [one.number for one in found] == list(range(12))
    assert all(1e-4 <= one.values["optimizer.lr"] <= 1e-1 and one.values["method.rank"] in (4, 8) for one in found)
    assert study.done == 12
    kept = optuna.load_study(study_name=study._study.study_name, storage=f"sqlite:///{sweep.path}/study.db")
    assert {trial.number: trial.value for trial in kept.trials} == {one.number: one.objective["loss"] for one in found}
    best = min(found, key=lambda one: one.objective["loss"])
    assert kept.best_trial.params == best.values
    assert best.name.startswith(f"{best.number:03d}-lr=")


@pytest.mark.parametrize("sampler", list(Sampler))
def test_every_sampler(sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    space = ("optimizer.lr=1e-3,1e-2", "method.rank=4,8") if sampler is Sampler.grid else SPACE
    sweep = Optuna(tmp_path, BOWL, monkeypatch)
    sweep.go(settings(sampler=sampler, trials=5), *space, slots=2)
    values = [tuple(one.values.values()) for one in read_records(sweep.path)]
    if sampler is Sampler.grid:
        assert sorted(values) == [(1e-3, 4), (1e-3, 8), (1e-2, 4), (1e-2, 8)], (
            "each combination once, whatever trials says"
        )
    else:
        assert len(values) == 5


def test_the_same_seed_draws_the_same_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        sweep = Optuna(tmp_path / name, BOWL, monkeypatch)
        sweep.go(settings(trials=3, seed=seed))
        drawn.append([one.values for one in read_records(sweep.path)])
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_study_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = """
if len(starts.read_text().splitlines()) == 1 and run_dir.name.startswith("001"):
    result("preempted"); sys.exit(75)
"""
    sweep = Optuna(tmp_path, script + BOWL, monkeypatch)
    sweep.go(settings(trials=3))
    assert [one.status for one in read_records(sweep.path)] == ["completed", "preempted", "completed"]
    before = [one.values for one in read_records(sweep.path)]
    sweep.go(settings(trials=5))
    after = read_records(sweep.path)
    assert [one.status for one in after] == ["completed"] * 5
    assert [one.values for one in after][:3] == before, "an unfinished trial keeps its values"
    assert [one.starts for one in after] == [1, 2, 1, 1, 1]
    assert after[3].values not in before, "another start does not draw the first one's numbers again"


def test_a_failed_trial_is_reported_and_another_start_replaces_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sweep = Optuna(tmp_path, "if run_dir.name.startswith('000'): sys.exit(1)\n" + BOWL, monkeypatch)
    study = sweep.go(settings(trials=3))
    assert [one.status for one in read_records(sweep.path)] == ["failed", "completed", "completed"]
    assert study.done == 2
    assert sweep.go(settings(trials=3)).done == 3


def test_a_metric_that_a_run_does_not_have_is_a_failure_of_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sweep = Optuna(tmp_path, "result('completed', eval_final={})", monkeypatch)
    assert sweep.go(settings(trials=2)).done == 0


CURVE = """
rank = int(words["method.rank"])
for step in range(1, 9):
    log(step, **{"eval/loss": (8 if rank == 8 else 1) / step})
    deadline = time.monotonic() + 0.15
    while time.monotonic() < deadline:
        if (run_dir / "PRUNE").exists():
            result("pruned", (run_dir / "PRUNE").read_text(), steps=step); sys.exit(0)
        time.sleep(0.01)
done(8 / 8 if rank == 8 else 1 / 8)
"""
BAD_AFTER_GOOD = ("method.rank=4,8", "trainer.seed=1,2")


# Not hyperband: which bracket a trial is in, and so whether it can be pruned at all, follows from a hash of the study's name.
@pytest.mark.parametrize("pruner", [Pruner.median, pytest.param(Pruner.asha, marks=pytest.mark.ci)])
def test_a_trial_that_falls_behind_ends(pruner: Pruner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sweep = Optuna(tmp_path, CURVE, monkeypatch)
    sweep.go(settings(pruner=pruner, sampler=Sampler.grid, startup_trials=1, reduction_factor=2), *BAD_AFTER_GOOD)
    by_rank: dict[int, list[Record]] = {}
    for one in read_records(sweep.path):
        by_rank.setdefault(one.values["method.rank"], []).append(one)
    assert "completed" in {one.status for one in by_rank[4]}
    pruned = [one for one in by_rank[8] if one.status == "pruned"]
    assert pruned
    for one in pruned:
        stored = records.read_result(sweep.path / one.name)
        assert stored is not None
        assert stored["status"] == "pruned"
        assert stored["steps"] < 8
        assert one.reason.startswith(f"pruned ({pruner.name}) at step ")
        assert one.objective["loss"] > 1 / 8
    again = sweep.go(
        settings(pruner=pruner, sampler=Sampler.grid, startup_trials=1, reduction_factor=2), *BAD_AFTER_GOOD
    )
    assert {one.starts for one in read_records(sweep.path)} == {1}, "a pruned trial is finished"
    assert again.done == 4


def test_a_pruned_trial_that_does_not_leave_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(schedule, "PRUNE_PATIENCE", 0.3)
    script = """
if words["method.rank"] == "4": log(1, **{"eval/loss": 1.0}); done(1.0); sys.exit(0)
log(1, **{"eval/loss": 2.0})
while len(asked) < 2: time.sleep(0.02)
result("failed", "stopped at once by a second signal"); sys.exit(1)
"""
    sweep = Optuna(tmp_path, script, monkeypatch)
    sweep.go(settings(pruner=Pruner.median, sampler=Sampler.grid, startup_trials=1), "method.rank=4,8")
    first, second = read_records(sweep.path)
    assert (first.status, second.status) == ("completed", "pruned")
    stored = records.read_result(sweep.path / second.name)
    assert stored is not None
    assert stored["status"] == "pruned"


def test_several_objectives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sweep = Optuna(tmp_path, BOWL, monkeypatch)
    study = sweep.go(settings(trials=4), objectives=("accuracy", "seconds"))
    names = [direction.name for direction in study._study.directions]
    assert names == ["MAXIMIZE", "MINIMIZE"]
    assert all(set(one.objective) == {"accuracy", "seconds"} for one in read_records(sweep.path))
    assert study._study.best_trials


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_two_machines_share_a_study(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each with a directory of its own; what one has finished the other does not do again."""
    storage = f"sqlite:///{tmp_path}/shared.db" if kind == "sqlite" else f"journal:{tmp_path}/shared.log"
    config = settings(trials=4, storage=storage, study="shared")
    for name in "ab":
        (tmp_path / name).mkdir()
    Optuna(tmp_path / "a", BOWL, monkeypatch).go(config)
    study = Optuna(tmp_path / "b", BOWL, monkeypatch).go(settings(trials=6, storage=storage, study="shared"))
    assert study.done == 6
    numbers = [[one.number for one in read_records(tmp_path / name / "sweep")] for name in "ab"]
    assert numbers == [[0, 1, 2, 3], [4, 5]]


def test_a_trial_of_another_machine_is_left_alone_while_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    storage = f"sqlite:///{tmp_path}/shared.db"
    config = settings(trials=2, storage=storage, study="shared")
    sweep = Optuna(tmp_path, BOWL, monkeypatch)
    elsewhere = sweep.study(config)
    trial = elsewhere.next()
    assert trial is not None
    own = elsewhere._running[trial.number]
    own.set_user_attr("dstune_owner", "elsewhere:1:1")
    sweep.go(config)
    assert [one.number for one in read_records(sweep.path)] == [1]
    own.set_user_attr("dstune_seen", time.time() - 3600)
    sweep.go(config)
    assert [one.number for one in read_records(sweep.path)] == [0, 1], "a silent machine's trial is taken over"


@pytest.mark.parametrize(
    ("config", "space", "objectives", "where"),
    [
        (settings(), SPACE, ("accuracy",), "sweep.objective"),
        (settings(), (SPACE[0], "method.rank=4,8,16"), ("loss",), "method.rank"),
        (settings(storage="sqlite:////no/such/folder/x.db", study="s"), SPACE, ("loss",), "sweep.storage"),
    ],
)
def test_another_study_is_refused(config, space, objectives, where, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sweep = Optuna(tmp_path, BOWL, monkeypatch)
    sweep.go(settings(trials=2))
    with pytest.raises(UserError) as error:
        sweep.study(config, *space, objectives=objectives)
    assert [problem.where for problem in error.value.problems] == [where]


def test_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install '\.\[optuna\]'"):
        Optuna(tmp_path, BOWL, monkeypatch).study(settings())
