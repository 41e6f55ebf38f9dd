"""The typed configuration of `sweep`: several runs of one configuration with other values (`dstune train -m`)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from dstune.config.fields import setting


class Sampler(Enum):
    tpe = "tpe"
    random = "random"
    grid = "grid"
    qmc = "qmc"
    gp = "gp"
    cmaes = "cmaes"
    nsgaii = "nsgaii"


class Pruner(Enum):
    none = "none"
    median = "median"
    asha = "asha"
    hyperband = "hyperband"


@dataclass(frozen=True)
class GridConfig:
    """Every combination of the values."""

    name: str = "grid"
    dir: str | None = None
    """Directory of the sweep, with one in it for each trial; `runs/NAME/sweep-ID` when not given. ID follows from the
    settings, so the same command continues."""
    parallel: int = setting(1, at_least=1)
    """Trials that run at the same time. They share the GPUs (or cores) of this machine; with launch=slurm, jobs in flight."""
    space: dict[str, Any] = setting({})
    """Values of keys in a file, as a list or as on the command line: `{optimizer.lr: [1e-5, 1e-4], method.rank: "8,16"}`."""
    objective: list[str] = setting([], example="[loss,seconds]")
    """Metrics that trials are compared by (also seconds, tokens_per_second, peak_memory_gib);
    `trainer.early_stopping.metric` when empty."""

    @property
    def optuna(self) -> OptunaConfig | None:
        """These settings, where Optuna chooses the values."""
        return None


@dataclass(frozen=True)
class OptunaConfig(GridConfig):
    """Values chosen by Optuna (Akiba et al. 2019, arXiv:1907.10902) from what earlier trials reached."""

    name: str = "optuna"
    trials: int = setting(20, at_least=1)
    """Total number of trials, including those of earlier starts and other machines."""
    sampler: Sampler = Sampler.tpe
    """How values are chosen: `tpe`, `random`, `grid`, `qmc` (quasi-random), `gp` (Gaussian process), `cmaes`, `nsgaii`."""
    seed: int = setting(0, at_least=0)
    """Seed of the sampler."""
    pruner: Pruner = Pruner.none
    """How trials that fall behind at the same step are ended early: `median`, `asha` (successive halving) or `hyperband`."""
    min_steps: int | None = setting(None, at_least=1)
    """No trial is ended before this optimizer step; `evaluate.every` when not given."""
    startup_trials: int = setting(4, at_least=1)
    """Trials that `median` lets finish before it ends any, and that tpe, gp and cmaes draw at random first."""
    reduction_factor: int = setting(3, at_least=2)
    """`asha` and `hyperband` let the best 1/N of the trials go on from each rung to the next, N times as long."""
    storage: str | None = setting(None, signed=True, example="sqlite:///study.db")
    """Where the study is kept: a database's URL, `journal:FILE` or `redis://HOST`, which several machines may share; a
    SQLite file in the sweep's directory when not given."""
    study: str | None = None
    """Name of the study in a storage; `NAME-ID` when not given."""

    @property
    def optuna(self) -> OptunaConfig:
        return self


SweepConfig = GridConfig | OptunaConfig

SWEEPS: dict[str, type] = {"grid": GridConfig, "optuna": OptunaConfig}
"""Classes of the group by the name of the choice."""
