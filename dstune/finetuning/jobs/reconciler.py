"""Reconciles the desired state, the database and the job folders, one step per job, repeatedly.

A step depends only on what is stored, so that a server killed between two steps leaves nothing that the next step does not handle.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from dstune.finetuning.jobs import lease
from dstune.finetuning.jobs.actions import JobActions
from dstune.finetuning.jobs.device_queue import DeviceQueue, Machine
from dstune.finetuning.jobs.folder import JOB_ID, SAVE, JobFolder
from dstune.finetuning.jobs.launcher import Launcher
from dstune.finetuning.jobs.planner import Plans
from dstune.finetuning.jobs.presets import LOCAL, Presets
from dstune.finetuning.jobs.results import Results
from dstune.finetuning.jobs.states import TERMINAL, State
from dstune.finetuning.jobs.store import JobStore
from dstune.finetuning.jobs.tables import Job
from dstune.finetuning.jobs.trainings import Trainings
from dstune.finetuning.jobs.validations import Validations

log = logging.getLogger("dstune.serve")

LEASE = "reconciler"
LEASE_SECONDS = 15.0
PAUSE_SECONDS = 2.0
"""Pause before the second start in a row without a new step; it doubles each time."""
SWEEP_SECONDS = 300.0
ORPHAN_SECONDS = 3600.0
"""After this time, a folder without a row is what an interrupted request left."""


class Reconciler:
    """Carries jobs through their phases: `validations`, then `queue`, then `trainings`."""

    def __init__(
        self,
        store: JobStore,
        folder: Path,
        presets: Callable[[], Presets],
        launcher: Launcher,
        results: Results,
        machine: Machine,
        keys: Callable[[Job], Mapping[str, str]] = lambda job: {},
        pause_seconds: float = PAUSE_SECONDS,
        has_space: Callable[[str], bool] = lambda project: True,
        plans: Plans | None = None,
    ):
        """folder: the parent of the job folders. keys, has_space: see `DeviceQueue`. plans: see `Validations`."""
        self._store, self._folder, self._launcher, self._results = store, folder, launcher, results
        self._actions = JobActions(store, folder, presets, launcher, results)
        self.validations = Validations(self._actions, plans)
        self.queue = DeviceQueue(self._actions, machine, keys, has_space, pause_seconds)
        self.trainings = Trainings(self._actions)
        self._owner = lease.owner()
        self.cancelled: deque[str] = deque(maxlen=10_000)
        """Jobs that clients of this process have just cancelled; those without a process are cleaned up at once."""
        self._swept_at = -SWEEP_SECONDS
        self.leads = False

    def step(self) -> None:
        """Process every unfinished job once."""
        self._launcher.reap()
        self.leads = lease.take(self._store.database, LEASE, self._owner, LEASE_SECONDS)
        if not self.leads:
            return
        running_validations, unread = 0, list[Job]()
        for job in self._store.unfinished():
            try:
                if job.state == State.VALIDATING:
                    if self.validations.check(job):
                        running_validations += 1
                    elif not self._actions.folder(job).validated.exists():
                        unread.append(job)
                elif job.state in (State.RUNNING, State.PAUSING):
                    self.trainings.watch(job)
                else:
                    self.trainings.wind_down(job)
            except Exception:
                log.exception("job %s: a step of the reconciler failed; it will be retried", job.id)
        self.validations.start_next(unread, running_validations)
        while self.cancelled:
            job = self._store.read(self.cancelled.popleft())
            if not job.active:
                self._actions.clean_up(job)
        self.queue.start_jobs()
        if time.monotonic() - self._swept_at > SWEEP_SECONDS:
            self._swept_at = time.monotonic()
            self._sweep()

    def _sweep(self) -> None:
        """Remove folders that interrupted requests left, and files of jobs that ended while no server ran."""
        paths = [path for path in self._folder.glob("ftjob-*") if JOB_ID.fullmatch(path.name)]
        states = self._store.states()  # read after the folders, which are created before their rows
        for path in paths:
            folder, (state, size) = JobFolder(path), states.get(path.name, (None, 0))
            if state is None and time.time() - path.stat().st_mtime > ORPHAN_SECONDS:
                folder.remove()
            elif (
                state in TERMINAL and any(map(Path.exists, folder.client_rows)) and not self._launcher.is_alive(folder)
            ):
                self._results.remove_unneeded_files(folder)
                self._store.measure(path.name, folder)
            elif state is not None and size == 0:  # written by a version that did not measure folders
                self._store.measure(path.name, folder)

    def save_all(self) -> None:
        """Ask local jobs to save and end, since their processes would not outlive this one. The next reconciler restarts them."""
        if not self.leads:
            return
        active = [job for job in self._store.unfinished() if job.active and job.pool == LOCAL]
        while active := [job for job in active if self._launcher.is_alive(self._actions.folder(job))]:
            for job in active:
                self._actions.request_end(self._actions.folder(job), SAVE)
            lease.take(self._store.database, LEASE, self._owner, LEASE_SECONDS)
            time.sleep(0.2)
            self._launcher.reap()

    def leave(self) -> None:
        """Release the lease, so that another process can take over at once."""
        if self.leads:
            lease.release(self._store.database, LEASE, self._owner)
