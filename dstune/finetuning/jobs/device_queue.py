"""The queue of a server's jobs: gives free devices to waiting jobs and starts their trainings."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dstune.finetuning.jobs import configuration
from dstune.finetuning.jobs.actions import JobActions, seconds_left
from dstune.finetuning.jobs.launcher import device_environment
from dstune.finetuning.jobs.presets import LOCAL, Preset
from dstune.finetuning.jobs.process import TRAIN
from dstune.finetuning.jobs.scheduler import DEFAULT_SECONDS, Busy, Waiting, choose
from dstune.finetuning.jobs.states import Change, State
from dstune.finetuning.jobs.store import Message
from dstune.finetuning.jobs.tables import Job

log = logging.getLogger("dstune.serve")

LONGEST_PAUSE = 300.0
TOO_MANY_DEVICES = "The job needs {} devices, and this server has {}."


@dataclass(frozen=True)
class Machine:
    """The devices that jobs share."""

    devices: int
    gpus: Sequence[str] = ()

    def capacity(self, requested: int | None) -> int:
        """Return the number of devices that jobs may use. requested: by `queue.devices`; a GPU is never shared by two jobs."""
        if requested is None:
            return self.devices
        return min(requested, len(self.gpus)) if self.gpus else requested


class DeviceQueue:
    """Starts waiting jobs when devices and storage space are free."""

    def __init__(
        self,
        actions: JobActions,
        machine: Machine,
        keys: Callable[[Job], Mapping[str, str]],
        has_space: Callable[[str], bool],
        pause_seconds: float,
    ):
        """keys: returns the environment variables of a job's project accounts (W&B). has_space: returns whether a project may store
        more. pause_seconds: pause before the second start in a row without a new step; it doubles each time."""
        self._actions, self._machine, self._keys, self._has_space = actions, machine, keys, has_space
        self.pause_seconds = pause_seconds
        self.variables: Mapping[str, str] = {}
        """The environment of each local training that has no control group of its own."""

    def start_jobs(self) -> None:
        """Start every waiting job whose turn it is."""
        actions = self._actions
        settings, now, has_space = actions.presets().queue, time.time(), functools.cache(self._has_space)
        waiting = [
            Waiting(
                job.id, job.number, job.organization, job.key, job.priority, job.pool,
                seconds=seconds_left(job) or DEFAULT_SECONDS, **self._devices(job),
            )
            for job in actions.store.queued()
            if now - (job.started_at or 0.0) >= self._pause(job) and self._fits(job) and self._may_store(job, has_space)
        ]  # fmt: skip
        if not waiting:
            return
        active = [job for job in actions.store.unfinished() if job.active]
        busy = [
            Busy(
                job.organization, job.key, job.pool, job.taken,
                job.devices * max(now - (job.started_at or now), seconds_left(job) or DEFAULT_SECONDS),
            )
            for job in active
        ]  # fmt: skip
        used = actions.store.used(now - 3600 * settings.share_hours)
        for waiting_job, taken in choose(waiting, busy, used, settings, self.capacity()):
            try:
                self._start(waiting_job.id, taken)
            except Exception:
                log.exception("job %s could not be started; it will be retried", waiting_job.id)

    def capacity(self) -> int:
        """Return the number of local devices that jobs may use."""
        return self._machine.capacity(self._actions.presets().queue.devices)

    def _devices(self, job: Job) -> dict[str, int]:
        """Return how many devices the job takes and the fewest it needs, by its current preset: a job may continue with another
        number."""
        preset = self._current_preset(job)
        if preset is None:
            return {"devices": job.devices, "fewest": job.devices}
        return {"devices": preset.devices, "fewest": preset.fewest}

    def _current_preset(self, job: Job) -> Preset | None:
        """Return the current preset; None if the operator has removed it, or moved it to another pool."""
        preset = self._actions.presets().models.get(job.preset)
        return preset if preset is not None and preset.pool == job.pool else None

    def _pause(self, job: Job) -> float:
        """Return the seconds to wait before the next attempt: the cause of a crash may take a while to pass."""
        return min(LONGEST_PAUSE, self.pause_seconds * 2 ** (job.idle_attempts - 1)) if job.idle_attempts else 0.0

    def _fits(self, job: Job) -> bool:
        """Return whether the server has enough devices at all: a job that needs more (a GPU is gone) must not block others."""
        most, needed = self.capacity(), self._devices(job)["fewest"]
        if job.pool != LOCAL or needed <= most:
            return True
        memory = self._actions.memory(job)
        if not memory.waits_for_devices:
            memory.waits_for_devices = True
            self._actions.warn(job, f"{TOO_MANY_DEVICES.format(needed, most)} It waits until there are more.")
        return False

    def _may_store(self, job: Job, has_space: Callable[[str], bool]) -> bool:
        """Return whether its project has space for its results. A job that has started before may always continue: its space is
        already counted."""
        memory = self._actions.memory(job)
        if job.attempt or has_space(job.project):
            memory.waits_for_space = False
            return True
        if not memory.waits_for_space:
            memory.waits_for_space = True
            self._actions.warn(job, "The project has no space left: the job starts when files or models are deleted.")
        return False

    def _start(self, job_id: str, taken: list[int]) -> None:
        """Start a job: the row first, then the process. If the server is killed in between, the next one finds a running job
        without a process."""
        store = self._actions.store
        with store.database.writing.begin() as session:
            job = store.lock_row(session, job_id)
            if job.state != State.QUEUED or job.active:
                return  # cancelled or paused in the meantime
            is_first, reached, devices_before = job.attempt == 0, job.last_step, job.devices
            devices = len(taken) or self._devices(job)["devices"]
            text = "Fine-tuning job started" if is_first else f"Fine-tuning job continues after step {reached}"
            if devices != devices_before:
                text += f" on {devices} device(s), not on {devices_before}"
            store.change(
                session, job, Change.START, [Message(text)],
                active=True, taken=taken, devices=devices, attempt=job.attempt + 1, attempt_step=reached, started_at=time.time(),
                estimated_finish=round(time.time() + seconds) if (seconds := seconds_left(job)) else None,
            )  # fmt: skip
        task = {"phase": TRAIN, "job": job.id, "attempt": job.attempt, "pool": job.pool}
        if job.pool == LOCAL:
            task["devices"] = devices
        elif preset := self._current_preset(job):
            configuration.update_launch(self._actions.folder(job), preset)
        env = dict(self._keys(job))
        if job.pool == LOCAL:
            env |= device_environment(taken, self._machine.gpus)
            # In the control group of one job, a process that later jobs need would be killed with that job.
            env |= {} if self._actions.presets().prefix else self.variables
        self._actions.launcher.start(self._actions.folder(job), task, env)
