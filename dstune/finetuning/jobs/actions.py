"""Actions on a job that every phase needs: change its state, end its attempt, fail it, stop its process, clean up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstune.finetuning.jobs.folder import NOW, JobFolder, read
from dstune.finetuning.jobs.launcher import Launcher, stop_orphan
from dstune.finetuning.jobs.metrics import Reader
from dstune.finetuning.jobs.presets import Preset, Presets
from dstune.finetuning.jobs.results import Results
from dstune.finetuning.jobs.states import Change
from dstune.finetuning.jobs.store import JobStore, Message, note
from dstune.finetuning.jobs.tables import Job

INTERNAL = "The job failed for an internal reason; the operator of the server finds it in the log of the job."
ORPHAN_WAIT_SECONDS = 5.0
"""After this time without an end, a stop request goes to the training directly: its job process may be gone."""


@dataclass
class JobMemory:
    """What this process remembers of an unfinished job; losing it in a restart is harmless."""

    reader: Reader
    validations: int = 0
    """How many times a validation of its files was started."""
    measured_at: float | None = None
    """When its folder was last measured, in monotonic seconds."""
    is_rewound: bool = False
    """Whether its training restarted from a checkpoint and has not yet passed the step reached before."""
    waits_for_devices: bool = False
    """Whether its client was warned that the server has too few devices."""
    waits_for_space: bool = False
    """Whether its client was warned that the project has no storage space left."""


class JobActions:
    """The state of jobs (database, folders, processes) with the actions that all phases of a job share."""

    def __init__(
        self, store: JobStore, jobs: Path, presets: Callable[[], Presets], launcher: Launcher, results: Results
    ):
        """jobs: the parent of the job folders."""
        self.store, self.presets, self.launcher, self.results = store, presets, launcher, results
        self._jobs = jobs
        self._memories: dict[str, JobMemory] = {}

    def folder(self, job: Job) -> JobFolder:
        return JobFolder.of(self._jobs, job.id)

    def memory(self, job: Job) -> JobMemory:
        if job.id not in self._memories:
            self._memories[job.id] = JobMemory(Reader(self.folder(job).run / "metrics.jsonl"))
        return self._memories[job.id]

    def preset_or_fail(self, job: Job) -> Preset | None:
        """Return the job's preset. If the operator has removed it, fail the job and return None."""
        preset = self.presets().models.get(job.preset)
        if preset is None:
            self.fail(job, "model_not_available", f"The model {job.preset} is not offered any more.", "model")
        return preset

    def warn(self, job: Job, text: str) -> None:
        """Add a warning to the job's events."""
        with self.store.database.writing.begin() as session:
            note(session, self.store.lock_row(session, job.id), Message(text, "warn"))

    def change(self, job: Job, change: Change, messages: Sequence[Message] = (), **values: Any) -> None:
        """Change the state of `job`, unless a client has changed it since `job` was read."""
        with self.store.database.writing.begin() as session:
            row = self.store.lock_row(session, job.id)
            if row.state == job.state and row.version == job.version:
                self.store.change(session, row, change, messages, **values)

    def end_attempt(
        self, job: Job, change: Change, messages: Sequence[Message], *, exports: bool = False, **values: Any
    ) -> bool:
        """End an attempt in one transaction. Returns whether the job was still in this attempt.

        exports: add the checkpoints exported so far as models.
        """
        with self.store.database.writing.begin() as session:
            row = self.store.lock_row(session, job.id)
            if row.state != job.state or row.attempt != job.attempt:
                return False
            self.account(row)
            texts = (
                self.results.pause(session, row, self.folder(row), self.memory(job).reader.read()) if exports else []
            )
            self.store.change(session, row, change, [*map(Message, texts), *messages], **values)
        if exports:
            self.results.published()
        self.store.measure(job.id, self.folder(job))
        return True

    def fail(self, job: Job, code: str, message: str, param: Any) -> None:
        error = {"code": code, "message": message, "param": param}
        if self.end_attempt(job, Change.FAIL, [Message(message, "error")], error=error):
            self.clean_up(job)

    def account(self, row: Job) -> None:
        """Account for the end of an attempt: free its devices and count its device time, without the time in a cluster's queue."""
        if row.active:
            ended, seconds = read(self.folder(row).ended) or {}, time.time() - (row.started_at or time.time())
            if ended.get("attempt") == row.attempt and ended.get("seconds") is not None:
                seconds = float(ended["seconds"])
            row.device_seconds += row.devices * max(0.0, seconds)
            row.active, row.taken = False, []

    def request_end(self, folder: JobFolder, how: str) -> None:
        """Ask a job's process to end. how: `save` or `now`."""
        if folder.stop_requested() not in (how, NOW):
            folder.request_stop(how)
        elif folder.lock.is_file() and time.time() - folder.stop.stat().st_mtime > ORPHAN_WAIT_SECONDS:
            stop_orphan(folder, how)

    def clean_up(self, job: Job) -> None:
        """Clean up after a job that has ended: its files and optimizer states are no longer needed."""
        self._memories.pop(job.id, None)
        folder = self.folder(job)
        if not self.launcher.is_alive(folder):
            self.results.remove_unneeded_files(folder)
            self.store.measure(job.id, folder)


def seconds_left(job: Job) -> float | None:
    """Return the expected duration of the job's remaining steps; None if the time of a step is unknown."""
    if job.step_seconds is None or job.total_steps is None:
        return None
    return job.step_seconds * max(1, job.total_steps - job.last_step)
