"""`sweep=optuna`: an Optuna study proposes the trials, learns from their results, and prunes them.

The published Hydra plugin is pinned to Optuna 2 and cannot resume runs. This module uses the study's ask-and-tell interface, and
lets several machines share a study.
"""

from __future__ import annotations

import hashlib
import math
import os
import socket
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from dstune.config.cadence import first_evaluation
from dstune.config.schema import RunConfig
from dstune.config.sweep_schema import OptunaConfig, Pruner, Sampler
from dstune.config.sweep_space import Assignment, Axis, grid
from dstune.core.errors import Problem, UserError, with_class
from dstune.sweep.directory import Sweep, identity, status_in, trial_name, write_record
from dstune.sweep.outcome import Metrics, ended_unwatched, reached
from dstune.sweep.schedule import Trial
from dstune.tracking.trials import FINISHED, Record, less_is_better, read_record, record_path

if TYPE_CHECKING:
    import optuna

OWNER, HEARTBEAT, OBJECTIVES, STARTS = "dstune_owner", "dstune_seen", "dstune_objectives", "dstune_starts"
"""Attributes of trials and studies. The owner is the process that runs the trial; empty if no process does."""
HEARTBEAT_SECONDS, ABANDONED_SECONDS = 60.0, 600.0
"""How often the owner of a trial in a shared storage renews its heartbeat, and the silence after which others resume its trial."""
ASK_AGAIN_SECONDS = 5.0
"""Once the study has had no trial to run, it is asked again after this time."""


class Study:
    """The trials of a sweep, as an Optuna study proposes them (see `schedule.Source`).

    objectives: names of metrics; the first one ranks the trials.
    """

    def __init__(self, sweep: Sweep, objectives: Sequence[str]):
        """Open the study, or create it.

        Raises UserError: Optuna is not installed, the storage cannot be used, or the study has other objectives or values.
        """
        assert sweep.base.sweep.optuna is not None
        self._sweep, self._config, self._axes = sweep.path, sweep.base, sweep.axes
        self._settings = sweep.base.sweep.optuna
        self._objectives = list(objectives)
        self._optuna = _import_optuna()
        self._distributions = {axis.key: self._distribution(axis) for axis in self._axes}
        self._study = self._open()
        self._planned_trials = self._settings.trials
        self._check()
        if self._settings.sampler is Sampler.grid:
            self._planned_trials = self._enqueue_all()
        self._running: dict[int, optuna.Trial] = {}
        """Trials of this process, by number."""
        self._preempted: set[int] = set()
        """Trials that saved and exited by themselves (run.time_limit): the next start of the sweep resumes them."""
        self._failed = 0
        self._exhausted_at = -math.inf
        """When the study last had no trial to run, in seconds of `time.monotonic`."""
        self._last_heartbeat = time.monotonic()
        process = psutil.Process()
        self._owner = f"{socket.gethostname()}:{process.pid}:{process.create_time():.0f}"

    @property
    def planned_trials(self) -> int:
        return self._planned_trials

    @property
    def done(self) -> int:
        """The number of trials that ended, failures apart."""
        states = self._optuna.trial.TrialState
        return len(self._study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED)))

    # ---- the interface of schedule.Source ----

    def next(self) -> Trial | None:
        if self.exhausted:
            return None
        states = self._optuna.trial.TrialState
        trials = self._study.get_trials(deepcopy=False)
        for frozen in trials:
            is_handled = frozen.number in self._running or frozen.number in self._preempted
            if frozen.state is states.RUNNING and not is_handled and self._is_abandoned(frozen):
                resumed = self._begin(self._optuna.Trial(self._study, frozen._trial_id))
                if status_in(self._sweep / resumed.name) not in FINISHED:
                    return resumed
                self._record_end(resumed)  # it had ended when the sweep was killed
        started = sum(frozen.state in (states.COMPLETE, states.PRUNED, states.RUNNING) for frozen in trials)
        if started + self._failed >= self._planned_trials:
            self._exhausted_at = time.monotonic()
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lists as choices, experimental samplers
            return self._begin(self._study.ask(fixed_distributions=self._distributions))

    @property
    def exhausted(self) -> bool:
        return time.monotonic() - self._exhausted_at < ASK_AGAIN_SECONDS

    def watch(self, trial: Trial, rows: Sequence[Mapping[str, Any]]) -> str:
        self._send_heartbeat()
        if self._settings.pruner is Pruner.none:
            return ""
        trial_of_study, name = self._running[trial.number], f"eval/{self._objectives[0]}"
        reported = self._study._storage.get_trial(trial_of_study._trial_id).intermediate_values
        for row in rows:
            if name not in row or row["step"] == 0 or row["step"] in reported:
                continue
            value = row[name]
            trial_of_study.report(math.nan if value is None else float(value), row["step"])
            if trial_of_study.should_prune():
                value_text = "not finite" if value is None else f"{value:.4g}"
                return (
                    f"pruned ({self._settings.pruner.name}) at step {row['step']}: {self._objectives[0]} {value_text}"
                )
        return ""

    def ended(self, trial: Trial, status: str, run_dir: Path) -> dict[str, float]:
        states = self._optuna.trial.TrialState
        trial_of_study = self._running.pop(trial.number)
        self._exhausted_at = -math.inf
        if status == "preempted":
            trial_of_study.set_user_attr(OWNER, "")
            self._preempted.add(trial.number)
            return {}
        objectives_reached = reached(run_dir, self._config, self._objectives)
        if status == "pruned":
            self._study.tell(trial.number, state=states.PRUNED)
            return objectives_reached or self._last_evaluation(run_dir)
        if status in FINISHED and len(objectives_reached) == len(self._objectives):
            self._study.tell(trial.number, [objectives_reached[name] for name in self._objectives])
            return objectives_reached
        self._failed += 1
        self._study.tell(trial.number, state=states.FAIL)
        return objectives_reached if status in FINISHED else {}

    # ---- helpers ----

    def _begin(self, trial_of_study: optuna.Trial) -> Trial:
        self._running[trial_of_study.number] = trial_of_study
        trial_of_study.set_user_attr(OWNER, self._owner)
        trial_of_study.set_user_attr(HEARTBEAT, time.time())
        values = tuple(axis.value(trial_of_study.params[axis.key]) for axis in self._axes)
        assignment = Assignment(tuple(self._axes), values)
        return Trial(
            trial_name(assignment, trial_of_study.number), trial_of_study.number, assignment.overrides, assignment.plain
        )

    def _record_end(self, trial: Trial) -> None:
        """Record a trial that ended while no sweep watched it."""
        run_dir, status = self._sweep / trial.name, status_in(self._sweep / trial.name)
        record = read_record(record_path(self._sweep, trial.name))
        record = record or Record(trial.name, trial.number, dict(trial.values))
        objective = self.ended(trial, status, run_dir)
        write_record(self._sweep, ended_unwatched(record, status, run_dir, objective))

    def _last_evaluation(self, run_dir: Path) -> dict[str, float]:
        """Return the last value of the first objective in `metrics.jsonl`, by its name; empty if there is none."""
        name = self._objectives[0]
        values = [row.get(f"eval/{name}") for row in Metrics(run_dir).new()]
        last = next((value for value in reversed(values) if isinstance(value, (int, float))), None)
        return {} if last is None else {name: float(last)}

    def _is_abandoned(self, frozen: optuna.trial.FrozenTrial) -> bool:
        """Return whether no process runs this unfinished trial any more."""
        owner, heartbeat = frozen.user_attrs.get(OWNER), frozen.user_attrs.get(HEARTBEAT, 0.0)
        if owner is None:  # in a shared storage, another program has it, or another machine is just starting it
            return self._settings.storage is None
        if (
            self._settings.storage is None or not owner
        ):  # this process holds the lock of the directory: the owner is gone
            return True
        host, pid, started = owner.rsplit(":", 2)
        if host == socket.gethostname():
            return not _is_alive(int(pid), float(started))
        return time.time() - heartbeat > ABANDONED_SECONDS

    def _send_heartbeat(self) -> None:
        if self._settings.storage is None or time.monotonic() - self._last_heartbeat < HEARTBEAT_SECONDS:
            return
        self._last_heartbeat = time.monotonic()
        for trial_of_study in self._running.values():
            trial_of_study.set_user_attr(HEARTBEAT, time.time())

    def _open(self) -> optuna.Study:
        settings, optuna_ = self._settings, self._optuna
        location = settings.storage or f"sqlite:///{self._sweep.absolute() / 'study.db'}"
        name = settings.study or f"{self._config.run.name}-{identity(self._config, self._axes)}"
        directions = ["minimize" if less_is_better(metric) else "maximize" for metric in self._objectives]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                study = optuna_.create_study(
                    storage=_storage(optuna_, location),
                    study_name=name,
                    directions=directions,
                    load_if_exists=True,
                    pruner=_pruner(optuna_, settings, self._config),
                )
                starts = study.user_attrs.get(STARTS, 0)
                # A later start, or another machine, must not draw the same random numbers as the first one.
                seed = _mix_seed(settings.seed, starts) if starts else settings.seed
                study.sampler = _sampler(optuna_, settings, seed)
        except UserError:
            raise
        except Exception as error:  # from SQLAlchemy, its drivers, redis, or the file system
            reason = f"the storage cannot be used: {with_class(error)}"
            fix = "check the address, and that the driver of the database is installed"
            raise UserError(Problem("sweep.storage", reason, fix, location)) from None
        study.set_user_attr(STARTS, starts + 1)
        return study

    def _check(self) -> None:
        """Raise UserError if an existing study has other objectives or another search space."""
        study, optuna_ = self._study, self._optuna
        objectives_before = study.user_attrs.get(OBJECTIVES)
        if objectives_before is None:
            study.set_user_attr(OBJECTIVES, self._objectives)
        elif objectives_before != self._objectives:
            fix = f"sweep.objective=[{','.join(objectives_before)}], or another sweep.dir (with a storage: another sweep.study)"
            reason = f"the study {study.study_name} compares trials by {', '.join(objectives_before)}"
            raise UserError(Problem("sweep.objective", reason, fix, f"[{','.join(self._objectives)}]"))
        problems: dict[str, Problem] = {}
        for trial in study.get_trials(deepcopy=False):
            for key, old_distribution in trial.distributions.items():
                try:
                    optuna_.distributions.check_distribution_compatibility(old_distribution, self._distributions[key])
                except (KeyError, ValueError):
                    choices = getattr(old_distribution, "choices", None)
                    fix = f"{key}={','.join(map(str, choices))}" if choices else "give the earlier values"
                    reason = f"the study {study.study_name} began with other values, and its results are about those"
                    problems[key] = Problem(key, reason, f"{fix}, or another sweep.dir", "")
        if problems:
            raise UserError(problems.values())

    def _distribution(self, axis: Axis) -> optuna.distributions.BaseDistribution:
        kinds = self._optuna.distributions
        if axis.is_interval and axis.integer:
            return kinds.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
        if axis.is_interval:
            return kinds.FloatDistribution(axis.low, axis.high, log=axis.log)
        if axis.step is not None and axis.integer:
            return kinds.IntDistribution(int(axis.low), int(axis.high), step=int(axis.step))
        if axis.step is not None:
            return kinds.FloatDistribution(axis.low, axis.high, step=axis.step)
        return kinds.CategoricalDistribution([value.plain for value in axis.values])

    def _enqueue_all(self) -> int:
        """Put every combination into the study's queue once, for `sweep.sampler=grid`, and return their number.

        Optuna's own grid sampler stops the study itself, which the ask-and-tell interface does not allow.
        """
        combinations = [assignment.plain for assignment in grid(self._axes)]
        enqueued = [
            frozen.params or frozen.system_attrs.get("fixed_params")
            for frozen in self._study.get_trials(deepcopy=False)
            if frozen.state is not self._optuna.trial.TrialState.FAIL
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for values in combinations:
                if values not in enqueued:
                    self._study.enqueue_trial(values)
        return len(combinations)


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError(
            Problem("sweep", "needs the package optuna", "pip install '.[optuna]' in a clone of dstune", "optuna")
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _storage(optuna: Any, location: str) -> Any:
    if location.startswith("journal:"):
        path = location.removeprefix("journal:").removeprefix("//")
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(path))
    if location.startswith(("redis://", "rediss://")):
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalRedisBackend(location))
    return location


def _sampler(optuna: Any, settings: OptunaConfig, seed: int) -> Any:
    samplers, startup_trials = optuna.samplers, settings.startup_trials
    match settings.sampler:
        case Sampler.tpe:
            # `constant_liar` counts a running trial as a bad one, so that trials at the same time are not close to each other.
            return samplers.TPESampler(
                seed=seed, n_startup_trials=startup_trials, multivariate=True, constant_liar=True
            )
        case Sampler.random | Sampler.grid:
            return samplers.RandomSampler(seed=seed)
        case Sampler.qmc:
            return samplers.QMCSampler(seed=settings.seed, scramble=True)
        case Sampler.gp:
            return samplers.GPSampler(seed=seed, n_startup_trials=startup_trials)
        case Sampler.cmaes:
            return samplers.CmaEsSampler(seed=seed, n_startup_trials=startup_trials)
        case Sampler.nsgaii:
            return samplers.NSGAIISampler(seed=seed)


def _pruner(optuna: Any, settings: OptunaConfig, config: RunConfig) -> Any:
    pruners, first_step = optuna.pruners, settings.min_steps or first_evaluation(config) or 1
    match settings.pruner:
        case Pruner.none:
            return pruners.NopPruner()
        case Pruner.median:
            return pruners.MedianPruner(n_startup_trials=settings.startup_trials, n_warmup_steps=first_step - 1)
        case Pruner.asha:
            return pruners.SuccessiveHalvingPruner(min_resource=first_step, reduction_factor=settings.reduction_factor)
        case Pruner.hyperband:
            return pruners.HyperbandPruner(
                min_resource=first_step,
                max_resource=config.trainer.max_steps or "auto",
                reduction_factor=settings.reduction_factor,
            )


def _mix_seed(seed: int, starts: int) -> int:
    """Return another seed for each start of the study."""
    return int.from_bytes(hashlib.sha256(f"{seed} {starts}".encode()).digest()[:4], "big")


def _is_alive(pid: int, started: float) -> bool:
    """Return whether the process that started at that time still runs: a later process may have its id."""
    try:
        return os.getpid() == pid or abs(psutil.Process(pid).create_time() - started) < 2.0
    except psutil.Error:
        return False
