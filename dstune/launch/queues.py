"""The queue that a run's jobs are in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from dstune.core.errors import Problem, UserError
from dstune.protocols import LAUNCHERS, launcher_of
from dstune.protocols.launcher import Job, Unreachable
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


class UnfinishedJobs:
    """The unfinished jobs of several runs. Each queue is queried once, for the jobs of all of them."""

    def __init__(self, launch_records: Iterable[LaunchRecord]):
        self._job_by_id: dict[str, dict[str, Job]] = {}
        self._failure: dict[str, str] = {}
        ids_by_launcher: dict[str, list[str]] = {}
        for record in launch_records:
            if record.jobs:
                ids_by_launcher.setdefault(record.launcher, []).extend(record.jobs)
        for launcher, ids in ids_by_launcher.items():
            queue = queue_named(launcher)
            if queue is None:
                continue
            try:
                self._job_by_id[launcher] = {job.id: job for job in queue.alive(list(dict.fromkeys(ids)))}
            except Unreachable as error:
                self._failure[launcher] = str(error)

    def of(self, record: LaunchRecord | None) -> tuple[Sequence[Job], str]:
        """Return the unfinished jobs of one of the runs, and the reason if they cannot be determined."""
        if record is None or not record.jobs:
            return [], ""
        try:
            queue = queue_of(record)
        except UserError as error:  # the launcher's plugin is missing, and the status must show without it too
            return [], error.problems[0].reason
        if failure := self._failure.get(record.launcher):
            return [], f"{queue.name}, which runs it as job {record.jobs[-1]}, does not answer here: {failure}"
        job_by_id = self._job_by_id.get(record.launcher, {})
        return [job_by_id[number] for number in record.jobs if number in job_by_id], ""
