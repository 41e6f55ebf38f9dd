"""The contracts between generic code and rooms: base classes without torch, with defaults for what a room leaves out.

`VERSION` changes when a plugin written for an earlier version may need a change; docs/plugins.md lists what changed.
"""

from __future__ import annotations

from dstune.core.registry import Registry
from dstune.protocols.callback import Action, Callback, Request
from dstune.protocols.launcher import Launcher
from dstune.protocols.method import Method
from dstune.protocols.optimizer import Optimizer, Schedule
from dstune.protocols.parallelism import Parallelism
from dstune.protocols.row_format import RowFormat
from dstune.protocols.task import Task
from dstune.protocols.tracker import Tracker

__all__ = [
    "CALLBACKS",
    "LAUNCHERS",
    "METHODS",
    "OPTIMIZERS",
    "PARALLELISMS",
    "ROW_FORMATS",
    "SCHEDULES",
    "TASKS",
    "TRACKERS",
    "VERSION",
    "Action",
    "Callback",
    "Launcher",
    "Method",
    "Optimizer",
    "Parallelism",
    "Request",
    "RowFormat",
    "Schedule",
    "Task",
    "Tracker",
    "callback",
    "launcher",
    "launcher_of",
    "method",
    "method_of",
    "optimizer",
    "optimizer_of",
    "parallelism",
    "parallelism_of",
    "row_format",
    "schedule",
    "schedule_of",
    "task",
    "task_of",
    "tracker",
]

VERSION = 1

TASKS: Registry[Task] = Registry("task", "dstune.tasks")
METHODS: Registry[Method] = Registry("method", "dstune.methods")
OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", "dstune.optim")
SCHEDULES: Registry[Schedule] = Registry("schedule", "dstune.optim")
ROW_FORMATS: Registry[RowFormat] = Registry("row format", "dstune.tasks")
CALLBACKS: Registry[Callback] = Registry("callback", "dstune.trainer.callbacks")
LAUNCHERS: Registry[Launcher] = Registry("launch", "dstune.launch", folders_only=True)
PARALLELISMS: Registry[Parallelism] = Registry("parallel", "dstune.parallel")
TRACKERS: Registry[Tracker] = Registry("tracker", "dstune.tracking.trackers")

task, method, optimizer, schedule = TASKS.add, METHODS.add, OPTIMIZERS.add, SCHEDULES.add
row_format = ROW_FORMATS.add
launcher, parallelism, callback, tracker = LAUNCHERS.add, PARALLELISMS.add, CALLBACKS.add, TRACKERS.add

task_of, method_of, optimizer_of, schedule_of = TASKS.of, METHODS.of, OPTIMIZERS.of, SCHEDULES.of
launcher_of, parallelism_of = LAUNCHERS.of, PARALLELISMS.of
