"""Reconciles the desired state, the database and the job folders, one step per job, repeatedly. A step depends only on what is
stored, so that a server killed between two steps leaves nothing that the next step does not handle."""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstune.core.errors import EXIT_DONE, EXIT_PREEMPTED, EXIT_USER
from dstune.finetuning.jobs import configuration, hyperparameters, lease, metrics
from dstune.finetuning.jobs.configuration import Plan
from dstune.finetuning.jobs.folder import JOB_ID, NOW, SAVE, JobFolder, read
from dstune.finetuning.jobs.launcher import Launcher, device_environment, stop_orphan
from dstune.finetuning.jobs.metrics import Reader
from dstune.finetuning.jobs.planner import DOES_NOT_FIT, Estimate, Plans, does_not_fit
from dstune.finetuning.jobs.presets import LOCAL, Preset, Presets
from dstune.finetuning.jobs.process import TRAIN, VALIDATE
from dstune.finetuning.jobs.results import Results
from dstune.finetuning.jobs.scheduler import DEFAULT_SECONDS, Busy, Waiting, choose
from dstune.finetuning.jobs.states import TERMINAL, Change, State
from dstune.finetuning.jobs.store import JobStore, Message, metric, note
from dstune.finetuning.jobs.tables import Job

log = logging.getLogger("dstune.serve")

LEASE = "reconciler"
LEASE_SECONDS = 15.0
VALIDATORS = 2
"""Concurrent validations; each takes one core."""
MOST_IDLE = 8
"""After this many starts in a row without a new step, a job has failed."""
PAUSE_SECONDS = 2.0
"""Pause before the second such start; it doubles each time."""
LONGEST_PAUSE = 300.0
MOST_VALIDATIONS = 5
MEASURE_SECONDS = 15.0
"""Interval of measuring a running job's folder."""
SWEEP_SECONDS = 300.0
ORPHAN_SECONDS = 3600.0
"""After this time, a folder without a row is what an interrupted request left."""
TOO_MANY_DEVICES = "The job needs {} devices, and this server has {}."
INTERNAL = "The job failed for an internal reason; the operator of the server finds it in the log of the job."
DATA_KEYS = {"training_file": "data.train", "validation_file": "data.validation"}


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


class Reconciler:
    """keys: returns the environment variables of a job's project accounts (W&B). has_space: returns whether a project may store
    more. plans: checks whether jobs fit before they wait for devices; None skips the check."""

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
        self._store, self._folder, self._presets = store, folder, presets
        self._launcher, self._results, self._machine, self._keys = launcher, results, machine, keys
        self._pause, self._has_space, self._plans = pause_seconds, has_space, plans
        self._owner = lease.owner()
        self._readers: dict[str, Reader] = {}
        self._validations: Counter[str] = Counter()
        self._turns: dict[str, int] = {}
        """When each organization's files were last validated, as a counter."""
        self._warned: set[str] = set()
        """Jobs that wait because there are too few devices."""
        self._rewound: set[str] = set()
        """Jobs whose training restarted from a checkpoint and has not yet passed the step reached before."""
        self._waiting_for_space: set[str] = set()
        """Jobs that wait for storage space."""
        self._measured: dict[str, float] = {}
        """When the folders of running jobs were last measured."""
        self.cancelled: deque[str] = deque(maxlen=10_000)
        """Jobs that clients of this process have just cancelled; those without a process are cleaned up at once."""
        self._swept = -SWEEP_SECONDS
        self.leads = False
        self.variables: Mapping[str, str] = {}
        """The environment of each local training that has no control group of its own."""

    def step(self) -> None:
        """Process every unfinished job once."""
        self._launcher.reap()
        self.leads = lease.take(self._store.database, LEASE, self._owner, LEASE_SECONDS)
        if not self.leads:
            return
        validating, unread = 0, list[Job]()
        for job in self._store.unfinished():
            try:
                if job.state == State.VALIDATING:
                    if self._validate(job):
                        validating += 1
                    elif not self._job_folder(job).validated.exists():
                        unread.append(job)
                elif job.state in (State.RUNNING, State.PAUSING):
                    self._watch(job)
                else:
                    self._wind_down(job)
            except Exception:
                log.exception("job %s could not be looked after; it is tried again", job.id)
        while unread and validating < VALIDATORS:
            # Start with the organization that has waited longest, so that many jobs of one do not delay others.
            job = min(unread, key=lambda job: (self._turns.get(job.organization, 0), job.number))
            unread.remove(job)
            self._turns[job.organization] = max(self._turns.values(), default=0) + 1
            try:
                validating += self._begin_validation(job)
            except Exception:
                log.exception("files of job %s could not be read; it is tried again", job.id)
        while self.cancelled:
            job = self._store.read(self.cancelled.popleft())
            if not job.active:
                self._clean_up(job)
        self._schedule()
        if time.monotonic() - self._swept > SWEEP_SECONDS:
            self._swept = time.monotonic()
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
        while active := [job for job in active if self._launcher.is_alive(self._job_folder(job))]:
            for job in active:
                self._request_end(self._job_folder(job), SAVE)
            lease.take(self._store.database, LEASE, self._owner, LEASE_SECONDS)
            time.sleep(0.2)
            self._launcher.reap()

    def leave(self) -> None:
        """Release the lease, so that another process can take over at once."""
        if self.leads:
            lease.release(self._store.database, LEASE, self._owner)

    # -- files

    def _validate(self, job: Job) -> bool:
        """Take over the result of a validation, or end one that takes too long. Returns whether it is still running."""
        folder = self._job_folder(job)
        validation = read(folder.validated)
        if validation is not None:
            self._validated(job, folder, validation)
            return False
        if not self._launcher.is_alive(folder):
            return False
        limit = self._presets().queue.validation_seconds
        if time.time() - folder.task.stat().st_mtime > limit:
            self._request_end(folder, NOW)
            message = f"The files were not read within {limit:g} s: give fewer or shorter rows."
            self._fail(job, "validation_timeout", message, "training_file")
            return False
        return True

    def _begin_validation(self, job: Job) -> bool:
        """Start a process that validates a job's files. Returns whether it was started; if it cannot be, the job fails."""
        self._validations[job.id] += 1
        if self._validations[job.id] > MOST_VALIDATIONS:
            self._fail(job, "server_error", INTERNAL, None)
            return False
        preset = self._preset(job)
        if preset is None:
            return False
        task = {
            "phase": VALIDATE,
            "job": job.id,
            "method": job.method,
            "training_file": job.training_file,
            "validation_file": job.validation_file,
            "most_rows": preset.most_rows,
            "model": {"name": preset.name, "path": preset.path, "revision": preset.revision},
        }
        return self._launcher.start(self._job_folder(job), task, {"CUDA_VISIBLE_DEVICES": ""})

    def _validated(self, job: Job, folder: JobFolder, validation: Mapping[str, Any]) -> None:
        error = validation.get("error")
        if isinstance(error, Mapping):
            self._fail(job, str(error["code"]), str(error["message"]), error.get("param"))
            return
        preset = self._preset(job)
        if preset is None:
            return
        estimate = Estimate(fits=True) if self._plans is None else self._plans.ask(preset, job.method)
        if estimate is None:
            return  # a plan is being made; the files have been validated already
        if not estimate.fits:
            self._fail(job, DOES_NOT_FIT, does_not_fit(preset, estimate), "model")
            return
        try:
            if job.start:
                folder.keep_start(self._results.folder_of(job.start))
        except (LookupError, FileNotFoundError):
            self._fail(job, "model_not_available", f"The model {job.start} was deleted.", "model")
            return
        rows = int(validation["training_file"]["rows"])
        resolved = hyperparameters.resolve(job.hyperparameters, rows, preset.devices)
        if int(resolved["n_epochs"]) > preset.most_epochs:
            resolved["n_epochs"] = preset.most_epochs  # only for "auto": an explicit number was checked at creation
        plan = Plan(
            job.id,
            job.method,
            resolved,
            job.seed,
            validation=job.validation_file is not None,
            start=str(folder.start) if job.start else None,
            wandb=next((integration["wandb"] for integration in job.integrations), None),
            grader=self._store.read(job.id).grader,
        )
        configuration.write(plan, preset, folder)
        messages = [Message(text, "warn") for text in validation.get("warnings", [])]
        messages.append(Message("Files validated, moving job to queued state"))
        total = hyperparameters.steps(rows, resolved)[1]
        values = {
            "hyperparameters": resolved,
            "rows": rows,
            "total_steps": total,
            "base_lr": preset.base_rate(job.method),
            "pool": preset.pool,
            "devices": preset.devices,
        }
        if self._plans is not None:
            seconds = estimate.row_seconds
            values["step_seconds"] = None if seconds is None else seconds * int(resolved["batch_size"])
            values["memory_gib"] = estimate.memory_gib
        self._validations.pop(job.id, None)
        self._change(job, Change.VALIDATED, messages, **values)
        self._store.measure(job.id, folder)

    # -- training

    def _watch(self, job: Job) -> None:
        folder = self._job_folder(job)
        alive = self._launcher.is_alive(folder)
        steps = self._reader(job).read()
        self._store_events(job, steps, ended=not alive)
        if alive:
            if job.state == State.PAUSING:
                self._request_end(folder, SAVE)
            if time.monotonic() - self._measured.get(job.id, -MEASURE_SECONDS) >= MEASURE_SECONDS:
                self._measured[job.id] = time.monotonic()
                self._store.measure(job.id, folder)
            return
        ended = read(folder.ended)
        if ended is None or ended.get("attempt") != job.attempt:
            self._handle_lost(job, steps, "its process ended without a result")
        elif ended["code"] == EXIT_DONE:
            self._complete(job, folder, steps, ended)
        elif ended["code"] == EXIT_PREEMPTED:
            self._handle_lost(job, steps, "the machine asked it to stop")
        elif int(ended["code"]) < 0:
            self._handle_lost(job, steps, "the cluster lost it")
        elif ended["code"] == EXIT_USER:
            self._handle_refusal(job, ended, steps)
        else:
            log.error("job %s failed: %s", job.id, str(ended.get("reason"))[:2000])
            self._fail(job, "server_error", INTERNAL, None)

    def _request_end(self, folder: JobFolder, how: str) -> None:
        """Ask a job's process to end."""
        if folder.stop_requested() not in (how, NOW):
            folder.request_stop(how)
        elif folder.lock.is_file() and time.time() - folder.stop.stat().st_mtime > 5.0:
            stop_orphan(folder, how)

    def _store_events(self, job: Job, steps: Sequence[metrics.Step], *, ended: bool) -> None:
        """Store new steps as events. The newest one waits for its evaluation, which is logged in a row of its own."""
        self._report_rewind(job, steps[-1].number if steps else 0, ended=ended)
        complete = steps if ended or job.validation_file is None else steps[:-1]
        new = [step for step in complete if step.number > job.last_step and "train_loss" in step.values]
        if not new:
            return
        per_epoch = metrics.steps_per_epoch(steps)
        total = job.total_steps or 0
        if per_epoch is not None:
            total = per_epoch * int(job.hyperparameters["n_epochs"])
        rates = sorted(step.seconds for step in steps[-20:] if step.seconds)
        seconds = rates[len(rates) // 2] if rates else job.step_seconds
        with self._store.database.writing.begin() as session:
            row = self._store.lock_row(session, job.id)
            for step in new:
                if step.number <= row.last_step:
                    continue
                row.last_step = step.number
                if metrics.becomes_event(step.number, total, ends_epoch=step.ends_epoch):
                    metric(session, row, step.number, metrics.message_of(step, total), metrics.data_of(step, total))
            row.total_steps, row.step_seconds = total, seconds
            if row.state == State.RUNNING and seconds is not None:
                row.estimated_finish = round(time.time() + seconds * max(0, total - row.last_step))
        job.last_step, job.total_steps, job.step_seconds = row.last_step, total, seconds

    def _report_rewind(self, job: Job, reached: int, *, ended: bool) -> None:
        """Report that a training has gone back to an earlier step: it continues from a checkpoint, possibly within the same
        attempt."""
        if reached >= job.last_step:
            self._rewound.discard(job.id)
        elif reached and not ended and job.id not in self._rewound:
            self._rewound.add(job.id)
            text = f"The training goes on from its checkpoint of step {reached}; it had reached step {job.last_step}"
            with self._store.database.writing.begin() as session:
                note(session, self._store.lock_row(session, job.id), Message(text, "warn"))

    def _handle_lost(self, job: Job, steps: Sequence[metrics.Step], why: str) -> None:
        """Handle a job whose process has ended before the job was over."""
        pausing = job.state == State.PAUSING
        if pausing:
            self._end_attempt(job, Change.HALT, [Message("The job is paused")], exports=True)
            return
        reached = steps[-1].number if steps else 0
        idle = 0 if reached > job.attempt_step else job.idle_attempts + 1
        if idle >= MOST_IDLE:
            log.error("job %s was started %d times and does not come beyond step %d", job.id, job.attempt, reached)
            self._fail(job, "server_error", INTERNAL, None)
            return
        message = Message(
            f"The job was interrupted at step {reached}: {why}. It goes on from its newest checkpoint", "warn"
        )
        self._end_attempt(job, Change.LOSE, [message], idle_attempts=idle)

    def _complete(self, job: Job, folder: JobFolder, steps: Sequence[metrics.Step], ended: Mapping[str, Any]) -> None:
        if not steps or steps[-1].number not in folder.exports():
            log.error("job %s completed without an export of its last step", job.id)
            self._fail(job, "server_error", INTERNAL, None)
            return
        with self._results.staged(steps) as staged, self._store.database.writing.begin() as session:
            row = self._store.lock_row(session, job.id)
            if row.state not in (State.RUNNING, State.PAUSING) or row.attempt != job.attempt:
                return  # cancelled in the meantime
            self._account(row)
            result, model, messages = self._results.complete(session, row, staged, folder, steps)
            self._store.change(
                session, row, Change.COMPLETE, [Message(text) for text in messages],
                trained_tokens=int(ended.get("tokens") or steps[-1].tokens or 0), result_file=result, fine_tuned_model=model,
            )  # fmt: skip
        self._clean_up(job)
        self._results.published()

    def _handle_refusal(self, job: Job, ended: Mapping[str, Any], steps: Sequence[metrics.Step]) -> None:
        """Handle exit code 2: an error in the client's rows, a second launch of the same directory, or the operator's preset."""
        problems = ended.get("problems") or []
        where = str(problems[0].get("where", "")) if problems else ""
        if where == "run.dir":
            self._handle_lost(job, steps, "another process of it was running still")
            return
        folder = self._job_folder(job)
        for param in ("training_file", "validation_file"):
            file = str(folder.of_param(param))
            if where.startswith(file) or where == DATA_KEYS[param]:
                line = where.removeprefix(file).lstrip(":")
                place = f" line {line}" if line.isdigit() else ""
                reason = str(problems[0].get("reason", "")).replace(str(folder.path), "")
                self._fail(job, f"invalid_{param}", f"{getattr(job, param)}{place}: {reason}", param)
                return
        log.error("job %s was refused: %s", job.id, str(ended.get("reason"))[:2000])
        self._fail(job, "server_error", INTERNAL, None)

    def _wind_down(self, job: Job) -> None:
        """Clean up the process of a job whose state says that it has none any more."""
        folder = self._job_folder(job)
        if self._launcher.is_alive(folder):
            self._request_end(folder, NOW if job.state == State.CANCELLED else SAVE)
            return
        self._store_events(job, self._reader(job).read(), ended=True)
        with self._store.database.writing.begin() as session:
            row = self._store.lock_row(session, job.id)
            if row.active:
                self._account(row)
                if row.state in TERMINAL:
                    self._results.count(session, row)
        if job.state in TERMINAL:
            self._clean_up(job)

    # -- devices

    def _schedule(self) -> None:
        settings, now, has_space = self._presets().queue, time.time(), functools.cache(self._has_space)
        waiting = [
            Waiting(
                job.id, job.number, job.organization, job.key, job.priority, job.pool,
                seconds=_seconds_left(job) or DEFAULT_SECONDS, **self._devices(job),
            )
            for job in self._store.queued()
            if now - (job.started_at or 0.0) >= self._pause_of(job) and self._fits(job) and self._may_store(job, has_space)
        ]  # fmt: skip
        if not waiting:
            return
        active = [job for job in self._store.unfinished() if job.active]
        busy = [
            Busy(
                job.organization, job.key, job.pool, job.taken,
                job.devices * max(now - (job.started_at or now), _seconds_left(job) or DEFAULT_SECONDS),
            )
            for job in active
        ]  # fmt: skip
        used = self._store.used(now - 3600 * settings.share_hours)
        for waiting_job, taken in choose(waiting, busy, used, settings, self.capacity()):
            try:
                self._start(waiting_job.id, taken)
            except Exception:
                log.exception("job %s could not be started; it is tried again", waiting_job.id)

    def capacity(self) -> int:
        """Return the number of local devices that jobs may use."""
        return self._machine.capacity(self._presets().queue.devices)

    def _devices(self, job: Job) -> dict[str, int]:
        """Return how many devices the job takes and the fewest it needs, by its current preset: a job may continue with another
        number."""
        preset = self._current_preset(job)
        if preset is None:
            return {"devices": job.devices, "fewest": job.devices}
        return {"devices": preset.devices, "fewest": preset.fewest}

    def _current_preset(self, job: Job) -> Preset | None:
        """Return the current preset; None if the operator has removed it, or moved it to another pool."""
        preset = self._presets().models.get(job.preset)
        return preset if preset is not None and preset.pool == job.pool else None

    def _fits(self, job: Job) -> bool:
        """Return whether the server has enough devices at all: a job that needs more (a GPU is gone) must not block others."""
        most, needed = self.capacity(), self._devices(job)["fewest"]
        if job.pool != LOCAL or needed <= most:
            return True
        if job.id not in self._warned:
            self._warned.add(job.id)
            with self._store.database.writing.begin() as session:
                text = f"{TOO_MANY_DEVICES.format(needed, most)} It waits until there are more."
                note(session, self._store.lock_row(session, job.id), Message(text, "warn"))
        return False

    def _may_store(self, job: Job, has_space: Callable[[str], bool]) -> bool:
        """Return whether its project has space for its results. A job that has started before may always continue: its space is
        already counted."""
        if job.attempt or has_space(job.project):
            self._waiting_for_space.discard(job.id)
            return True
        if job.id not in self._waiting_for_space:
            self._waiting_for_space.add(job.id)
            with self._store.database.writing.begin() as session:
                text = "The project has no space left: the job starts when files or models are deleted."
                note(session, self._store.lock_row(session, job.id), Message(text, "warn"))
        return False

    def _start(self, job_id: str, taken: list[int]) -> None:
        """Start a job: the row first, then the process. If the server is killed in between, the next one finds a running job
        without a process."""
        with self._store.database.writing.begin() as session:
            job = self._store.lock_row(session, job_id)
            if job.state != State.QUEUED or job.active:
                return  # cancelled or paused in the meantime
            first, reached, devices_before = job.attempt == 0, job.last_step, job.devices
            devices = len(taken) or self._devices(job)["devices"]
            text = "Fine-tuning job started" if first else f"Fine-tuning job continues after step {reached}"
            if devices != devices_before:
                text += f" on {devices} device(s), not on {devices_before}"
            self._store.change(
                session, job, Change.START, [Message(text)],
                active=True, taken=taken, devices=devices, attempt=job.attempt + 1, attempt_step=reached, started_at=time.time(),
                estimated_finish=round(time.time() + seconds) if (seconds := _seconds_left(job)) else None,
            )  # fmt: skip
        task = {"phase": TRAIN, "job": job.id, "attempt": job.attempt, "pool": job.pool}
        if job.pool == LOCAL:
            task["devices"] = devices
        elif preset := self._current_preset(job):
            configuration.update_launch(self._job_folder(job), preset)
        env = dict(self._keys(job))
        if job.pool == LOCAL:
            env |= device_environment(taken, self._machine.gpus)
            # In the control group of one job, a process that later jobs need would be killed with that job.
            env |= {} if self._presets().prefix else self.variables
        self._launcher.start(self._job_folder(job), task, env)

    # -- changes

    def _change(self, job: Job, change: Change, messages: Sequence[Message] = (), **values: Any) -> None:
        with self._store.database.writing.begin() as session:
            row = self._store.lock_row(session, job.id)
            # Not if a client has changed the job in the meantime.
            if row.state == job.state and row.version == job.version:
                self._store.change(session, row, change, messages, **values)

    def _end_attempt(
        self, job: Job, change: Change, messages: Sequence[Message], *, exports: bool = False, **values: Any
    ) -> bool:
        """End an attempt in one transaction. Returns whether the job was still in this attempt."""
        with self._store.database.writing.begin() as session:
            row = self._store.lock_row(session, job.id)
            if row.state != job.state or row.attempt != job.attempt:
                return False
            self._account(row)
            texts = (
                self._results.pause(session, row, self._job_folder(row), self._reader(job).read()) if exports else []
            )
            self._store.change(session, row, change, [*map(Message, texts), *messages], **values)
        if exports:
            self._results.published()
        self._store.measure(job.id, self._job_folder(job))
        return True

    def _fail(self, job: Job, code: str, message: str, param: Any) -> None:
        error = {"code": code, "message": message, "param": param}
        if self._end_attempt(job, Change.FAIL, [Message(message, "error")], error=error):
            self._clean_up(job)

    def _account(self, row: Job) -> None:
        """Account for the end of an attempt: free its devices and count its device time, without the time in a cluster's queue."""
        if row.active:
            ended, seconds = read(self._job_folder(row).ended) or {}, time.time() - (row.started_at or time.time())
            if ended.get("attempt") == row.attempt and ended.get("seconds") is not None:
                seconds = float(ended["seconds"])
            row.device_seconds += row.devices * max(0.0, seconds)
            row.active, row.taken = False, []

    def _clean_up(self, job: Job) -> None:
        """Clean up after a job that has ended: its files and optimizer states are no longer needed."""
        self._readers.pop(job.id, None)
        self._validations.pop(job.id, None)
        self._measured.pop(job.id, None)
        self._rewound.discard(job.id)
        folder = self._job_folder(job)
        if not self._launcher.is_alive(folder):
            self._results.remove_unneeded_files(folder)
            self._store.measure(job.id, folder)

    def _pause_of(self, job: Job) -> float:
        """Return the seconds to wait before the next attempt: the cause of a crash may take a while to pass."""
        return min(LONGEST_PAUSE, self._pause * 2 ** (job.idle_attempts - 1)) if job.idle_attempts else 0.0

    # -- helpers

    def _job_folder(self, job: Job) -> JobFolder:
        return JobFolder.of(self._folder, job.id)

    def _reader(self, job: Job) -> Reader:
        return self._readers.setdefault(job.id, Reader(self._job_folder(job).run / "metrics.jsonl"))

    def _preset(self, job: Job) -> Preset | None:
        """Return the preset; None if the operator has removed it, in which case the job is failed."""
        preset = self._presets().models.get(job.preset)
        if preset is None:
            self._fail(job, "model_not_available", f"The model {job.preset} is not offered any more.", "model")
        return preset


def _seconds_left(job: Job) -> float | None:
    if job.step_seconds is None or job.total_steps is None:
        return None
    return job.step_seconds * max(1, job.total_steps - job.last_step)
