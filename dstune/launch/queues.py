"""The queue that a run's jobs are in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dstune.core.errors import Problem, UserError
from dstune.protocols import LAUNCHERS, launcher_of
from dstune.protocols.launcher_options import SubmitsRuns

if TYPE_CHECKING:
    from dstune.launch.records import LaunchRecord
    from dstune.protocols.launcher import LaunchConfig, Queue


def queue_named(launcher: str) -> Queue | None:
    """Return the queue of a launcher; None if it has no queue or no such launcher is installed."""
    launcher_class = LAUNCHERS.find(launcher)
    return None if launcher_class is None else launcher_class.queue


def submitter_of(launch: LaunchConfig) -> SubmitsRuns | None:
    """Return the launcher of `launch` if it submits runs to a queue and returns at once; None if it waits for them."""
    launcher = launcher_of(launch)
    return launcher if isinstance(launcher, SubmitsRuns) and not launcher.waits else None


def queue_of(record: LaunchRecord) -> Queue:
    """Return the queue of a record with jobs.

    Raises:
        UserError: no launcher of this name has a queue, because its plugin is missing or the record is forged.
    """
    queue = queue_named(record.launcher)
    if queue is None:
        reason = "the run's jobs are in the queue of a launcher that is not installed here"
        raise UserError(Problem("launch.json", reason, "install or name the plugin that provides it", record.launcher))
    return queue
