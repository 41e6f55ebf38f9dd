"""The contracts between generic code and rooms: base classes without torch, with defaults for everything optional.

`VERSION` changes when a plugin written for an earlier version may need a change; docs/plugins.md lists what changed.
"""

from __future__ import annotations

from dstune.core.registry import VERSION, Registry
from dstune.core.verb import VERBS, Verb, verb
from dstune.protocols.callback import Action, Callback, Request
from dstune.protocols.data_source import DataSource
from dstune.protocols.environment import Environment, as_environment
from dstune.protocols.launcher import Launcher
from dstune.protocols.launcher_options import LAUNCHER_OPTIONS
from dstune.protocols.method import Method
from dstune.protocols.method_options import METHOD_OPTIONS
from dstune.protocols.metric import Metric
from dstune.protocols.model_registry import ModelRegistry
from dstune.protocols.optimizer import Optimizer, Schedule
from dstune.protocols.parallelism import Parallelism
from dstune.protocols.probe import Probe
from dstune.protocols.reward import Reward, as_reward
from dstune.protocols.row_format import RowFormat
from dstune.protocols.serving import EngineKind, Routes
from dstune.protocols.task import Task, TaskConfig
from dstune.protocols.task_options import TASK_OPTIONS
from dstune.protocols.tracker import Tracker

__all__ = [
    "CALLBACKS",
    "DATA_SOURCES",
    "ENGINES",
    "ENVIRONMENTS",
    "LAUNCHERS",
    "METHODS",
    "METRICS",
    "MODEL_REGISTRIES",
    "OPTIMIZERS",
    "PARALLELISMS",
    "PROBES",
    "REWARDS",
    "ROUTES",
    "ROW_FORMATS",
    "SCHEDULES",
    "TASKS",
    "TRACKERS",
    "VERBS",
    "VERSION",
    "Action",
    "Callback",
    "DataSource",
    "EngineKind",
    "Environment",
    "Launcher",
    "Method",
    "Metric",
    "ModelRegistry",
    "Optimizer",
    "Parallelism",
    "Probe",
    "Request",
    "Reward",
    "Routes",
    "RowFormat",
    "Schedule",
    "Task",
    "Tracker",
    "Verb",
    "callback",
    "data_source",
    "engine",
    "environment",
    "formats_for",
    "launcher",
    "launcher_of",
    "method",
    "method_of",
    "metric",
    "metric_names",
    "model_registry",
    "optimizer",
    "optimizer_of",
    "parallelism",
    "parallelism_of",
    "probe",
    "registered_metrics",
    "reward",
    "routes",
    "row_format",
    "schedule",
    "schedule_of",
    "task",
    "task_of",
    "tracker",
    "verb",
]

TASKS: Registry[Task] = Registry("task", Task, "dstune.tasks", options=TASK_OPTIONS)
METHODS: Registry[Method] = Registry("method", Method, "dstune.methods", options=METHOD_OPTIONS)
METRICS: Registry[Metric] = Registry("metric", Metric, "dstune.metrics")
OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", Optimizer, "dstune.optim")
SCHEDULES: Registry[Schedule] = Registry("schedule", Schedule, "dstune.optim")
ROW_FORMATS: Registry[RowFormat] = Registry("row format", RowFormat, "dstune.tasks")
CALLBACKS: Registry[Callback] = Registry("callback", Callback, "dstune.trainer.callbacks")
LAUNCHERS: Registry[Launcher] = Registry(
    "launch", Launcher, "dstune.launch", folders_only=True, in_wings="launchers", options=LAUNCHER_OPTIONS
)
PARALLELISMS: Registry[Parallelism] = Registry("parallel", Parallelism, "dstune.parallel")
REWARDS: Registry[Reward] = Registry("reward", Reward, "dstune.rewards", adapt=as_reward)
PROBES: Registry[Probe] = Registry("probe", Probe, "dstune.probes", in_wings="probes")
ENVIRONMENTS: Registry[Environment] = Registry("environment", Environment, adapt=as_environment)
TRACKERS: Registry[Tracker] = Registry("tracker", Tracker, "dstune.tracking.trackers")
DATA_SOURCES: Registry[DataSource] = Registry("data source", DataSource, in_wings="data_sources")
MODEL_REGISTRIES: Registry[ModelRegistry] = Registry(
    "model registry", ModelRegistry, in_wings="model_registries", in_runs=False
)
ENGINES: Registry[EngineKind] = Registry("engine", EngineKind, in_wings="engine_kinds", in_runs=False)
ROUTES: Registry[Routes] = Registry("routes", Routes, in_wings="gateway_routes", in_runs=False)

task, method, optimizer, schedule = TASKS.add, METHODS.add, OPTIMIZERS.add, SCHEDULES.add
row_format = ROW_FORMATS.add
launcher, parallelism, callback = LAUNCHERS.add, PARALLELISMS.add, CALLBACKS.add
tracker, metric, reward, environment = TRACKERS.add, METRICS.add, REWARDS.add, ENVIRONMENTS.add
probe = PROBES.add
engine, routes = ENGINES.add, ROUTES.add
data_source, model_registry = DATA_SOURCES.add, MODEL_REGISTRIES.add

task_of, method_of, optimizer_of, schedule_of = TASKS.of, METHODS.of, OPTIMIZERS.of, SCHEDULES.of
launcher_of, parallelism_of = LAUNCHERS.of, PARALLELISMS.of


def metric_names(config: TaskConfig) -> tuple[str, ...]:
    """Return the metrics of a task's evaluations that settings can name: the task's own, and those registered for it."""
    task = task_of(config)
    task_metrics = tuple(task.metrics)
    return task_metrics + tuple(name for name in registered_metrics(task) if name not in task_metrics)


def registered_metrics(task: Task) -> tuple[str, ...]:
    """Return the registered metrics that are computed from the predictions of `task`, in addition to its own."""
    return tuple(name for name in METRICS if METRICS[name].computed_for(task.name)) if task.has_predictions else ()


def formats_for(task: Task) -> tuple[str, ...]:
    """Return the row formats that a task reads: its own, then formats of plugins whose rows have the shape of one of these."""
    task_formats = task.read_formats
    return (
        *task_formats,
        *(
            name
            for name, form in ROW_FORMATS.classes().items()
            if form.shape in task_formats and name not in task_formats
        ),
    )
