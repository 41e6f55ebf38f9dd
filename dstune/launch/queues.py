"""The queue that a run's jobs are in."""

from __future__ import annotations

from dstune.core.errors import Problem, UserError
from dstune.launch.records import LaunchRecord
from dstune.protocols import LAUNCHERS
from dstune.protocols.launcher import Queue


def queue_of(record: LaunchRecord) -> Queue:
    """The queue of a record with jobs.

    Raises:
        UserError: no launcher of this name has a queue: it is a plugin's, or the record is a stranger's.
    """
    queue = LAUNCHERS[record.launcher].queue if record.launcher in LAUNCHERS else None
    if queue is None:
        reason = "the run's jobs are in the queue of a launcher that is not known here"
        raise UserError(Problem("launch.json", reason, "give the plugin that has it", record.launcher))
    return queue
