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
    """Return the queue of a launcher; None where it has none, or is not known here."""
    launcher_class = LAUNCHERS.find(launcher)
    return None if launcher_class is None else launcher_class.queue


def submitter_of(launch: LaunchConfig) -> SubmitsRuns | None:
    """Return the launcher that `launch` chooses, where it leaves runs to its queue and returns; None where it waits for them."""
    launcher = launcher_of(launch)
    return launcher if isinstance(launcher, SubmitsRuns) and not launcher.waits else None


def queue_of(record: LaunchRecord) -> Queue:
    """Return the queue of a record with jobs.

    Raises:
        UserError: no launcher of this name has a queue: it is a plugin's, or the record is a stranger's.
    """
    queue = queue_named(record.launcher)
    if queue is None:
        reason = "the run's jobs are in the queue of a launcher that is not known here"
        raise UserError(Problem("launch.json", reason, "give the plugin that has it", record.launcher))
    return queue
