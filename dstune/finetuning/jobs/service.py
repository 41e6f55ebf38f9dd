"""`/v1/fine_tuning/jobs`: the handlers of job requests, and the loop that runs the reconciler."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.orm import Session

from dstune.finetuning import audit, pages
from dstune.finetuning.creations import Attempt, is_retry
from dstune.finetuning.fields import refuse_body
from dstune.finetuning.files import Files
from dstune.finetuning.ids import new_id, unix_time
from dstune.finetuning.jobs import objects
from dstune.finetuning.jobs import request as requests
from dstune.finetuning.jobs.device_queue import TOO_MANY_DEVICES
from dstune.finetuning.jobs.folder import NOW, JobFolder
from dstune.finetuning.jobs.hyperparameters import AUTO
from dstune.finetuning.jobs.planner import DOES_NOT_FIT, Plans, does_not_fit
from dstune.finetuning.jobs.presets import LOCAL, Preset, Presets
from dstune.finetuning.jobs.reconciler import Reconciler
from dstune.finetuning.jobs.request import JobRequest
from dstune.finetuning.jobs.states import Change, State
from dstune.finetuning.jobs.store import JobStore
from dstune.finetuning.jobs.tables import Job
from dstune.finetuning.models.store import ModelStore
from dstune.finetuning.turns import Turns
from dstune.launch.local import warm
from dstune.serve.errors import ApiError
from dstune.serve.gateway.app import Gateway
from dstune.serve.gateway.request import Request
from dstune.serve.store.database import Database
from dstune.serve.store.keys import Caller

log = logging.getLogger("dstune.serve")

ROUTE = "fine_tuning.jobs"
STEP_SECONDS = 1.0
IDLE_SECONDS = 900
"""How long a process with preloaded imports waits for the next training."""
PURPOSE = "fine-tune"
AUDIT_WORDS = {Change.CANCEL: "cancelled", Change.PAUSE: "paused", Change.RESUME: "resumed"}
"""Words of the audit log."""
MOST_PAGE = 100
UNAVAILABLE = "The model {!r} is not available for fine-tuning, or does not exist; this server has {}."


class Jobs:
    def __init__(
        self,
        store: JobStore,
        files: Files,
        models: ModelStore,
        folder: Path,
        presets: Callable[[], Presets],
        plans: Plans,
        reconciler: Reconciler,
        has_wandb: Callable[[str], bool] = lambda project: False,
        runs: bool = True,
    ):
        """folder: the parent of the job folders. has_wandb: returns whether a project has a W&B key. runs: whether jobs run on this
        machine."""
        self._store, self._files, self._models, self._folder = store, files, models, folder
        self._presets, self._plans, self._reconciler, self._has_wandb = presets, plans, reconciler, has_wandb
        self._runs = runs
        # Snapshots of large files take seconds, so they use threads of their own.
        self._creating = Turns(8, "create-job", of_project=2)
        self._stop, self._wake = threading.Event(), threading.Event()
        store.wake = self._wake.set
        self.ends_all = os.getpid() == 1
        """Whether all processes end with this one, as in a container: local jobs save first."""

    @property
    def _database(self) -> Database:
        return self._store.database

    # -- routes

    async def create(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        job_request = requests.read(await request.json())
        attempt = Attempt.of(request, ROUTE, request.digest)
        made = await self._creating.run(request.key.project, self._create, request, attempt, job_request)
        self._wake.set()
        await request.answer(objects.job(made))

    async def listed(self, gateway: Gateway, request: Request) -> None:
        query = request.query(("after", "limit", "metadata"), families=("metadata",))
        page = pages.page_of(query, limit=20, most=MOST_PAGE)
        metadata = {
            name.removeprefix("metadata[").removesuffix("]"): value
            for name, value in query.items()
            if name.startswith("metadata[")
        }
        bare = query.get("metadata") == "null"
        if "metadata" in query and not bare:
            raise ApiError(400, "Invalid metadata: give metadata[KEY]=VALUE, or metadata=null.", param="metadata")
        rows, has_more = await asyncio.to_thread(
            self._store.page, request.key.project, page, metadata, without_metadata=bare
        )
        await request.answer(pages.listing([objects.job(row) for row in rows], has_more, ids=False))

    async def retrieve(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        await request.answer(objects.job(await asyncio.to_thread(self._read, request)))

    async def cancel(self, gateway: Gateway, request: Request) -> None:
        await self._request_change(request, Change.CANCEL, "The job was cancelled")

    async def pause(self, gateway: Gateway, request: Request) -> None:
        await self._request_change(request, Change.PAUSE, "A pause was asked for")

    async def resume(self, gateway: Gateway, request: Request) -> None:
        await self._request_change(request, Change.RESUME, "The job is resumed")

    async def events(self, gateway: Gateway, request: Request) -> None:
        page = pages.page_of(request.query(("after", "limit")), limit=20, most=MOST_PAGE)
        project, job = request.key.project, request.parameters["job"]
        rows, has_more = await asyncio.to_thread(self._store.events, project, job, page)
        await request.answer(pages.listing([objects.event(row) for row in rows], has_more, ids=False))

    async def checkpoints(self, gateway: Gateway, request: Request) -> None:
        page = pages.page_of(request.query(("after", "limit")), limit=10, most=MOST_PAGE)
        project, job = request.key.project, request.parameters["job"]
        rows, has_more = await asyncio.to_thread(self._store.checkpoints, project, job, page)
        await request.answer(pages.listing([objects.checkpoint(row) for row in rows], has_more))

    # -- the loop

    async def loop(self) -> None:
        """Run the reconciler until the server ends. It runs in a thread, since every step uses the database and the disk."""
        self._stop.clear()
        running = asyncio.ensure_future(asyncio.to_thread(self.run))
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            self.end()
            await running  # let its step finish before the database is closed
            raise

    def end(self) -> None:
        self._stop.set()
        self._wake.set()

    def run(self) -> None:
        with warm.offer(IDLE_SECONDS) as variables:
            self._reconciler.queue.variables = variables
            self._run()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            try:
                self._reconciler.step()
            except Exception:
                log.exception("a step of the reconciler failed; it will be retried")
            self._wake.wait(STEP_SECONDS)
        if self.ends_all:
            self._reconciler.save_all()
        with contextlib.suppress(Exception):
            self._reconciler.leave()

    # -- inside

    async def _request_change(self, request: Request, change: Change, message: str) -> None:
        request.query(())
        await refuse_body(request)
        repeated = is_retry(request.header("x-stainless-retry-count"))
        project, job = request.key.project, request.parameters["job"]

        def also(session: Session) -> None:
            if change is Change.RESUME:  # each pause leaves a checkpoint
                self._files.check_space(session, project)
            audit.note(session, request, f"fine_tuning.job.{AUDIT_WORDS[change]}", job)

        row = await asyncio.to_thread(
            self._store.request_change, project, job, change, repeated=repeated, message=message, also=also
        )
        if change is Change.CANCEL:  # the loop also stops trainings, but no longer looks at validations
            with contextlib.suppress(OSError):
                await asyncio.to_thread(JobFolder.of(self._folder, row.id).request_stop, NOW)
            self._reconciler.cancelled.append(row.id)
            self._wake.set()
        await request.answer(objects.job(row))

    def _read(self, request: Request) -> Job:
        with self._database.session() as session:
            return self._store.of(session, request.key.project, request.parameters["job"])

    def _create(self, request: Request, attempt: Attempt, job_request: JobRequest) -> Job:
        caller = request.key
        with self._database.session() as session:  # a retry is answered before anything is checked again
            earlier_id = attempt.earlier_object(session)
            if earlier_id is not None:
                return self._store.of(session, caller.project, earlier_id)
        preset, start = self._choose_preset(caller, job_request)
        # The first job of a preset is created before there is a plan; the reconciler fails it if it does not fit.
        plan = self._plans.ask(preset, job_request.method)
        if plan is not None and not plan.fits:
            raise ApiError(400, does_not_fit(preset, plan), param="model", code=DOES_NOT_FIT)
        job = self._row(caller, job_request, preset, start)
        with self._snapshots(caller, job) as folder, self._database.writing.begin() as session:
            self._database.exclusive(session, f"creations {caller.project}")
            earlier_id = attempt.earlier_object(session)
            if earlier_id is not None:
                folder.remove()
                return self._store.of(session, caller.project, earlier_id)
            self._check_limits(session, caller)
            self._files.check_space(session, caller.project, job.bytes)
            validation = "" if job.validation_file is None else f" and validation file: {job.validation_file}"
            reading = f"Validating training file: {job.training_file}{validation}"
            self._store.add(session, job, [f"Created fine-tuning job: {job.id}", reading])
            attempt.record(session, job.id)
            audit.note(session, request, "fine_tuning.job.created", job.id, model=job.model)
        return job

    def _choose_preset(self, caller: Caller, job_request: JobRequest) -> tuple[Preset, str | None]:
        """Return the preset, and the tuned model that training starts from. Raises ApiError."""
        presets, start = self._presets().models, None
        name = job_request.model
        if name.startswith("ft:"):
            tuned = self._models.find(caller, name)
            if tuned is not None and not caller.may_use(name):
                tuned = None
            if tuned is not None:
                name, start = tuned.preset, tuned.name
        preset = presets.get(name) if start or caller.may_use(name) else None
        if preset is None:
            available = ", ".join(filter(caller.may_use, presets)) or "no models"
            message = UNAVAILABLE.format(job_request.model[:128], available)
            raise ApiError(400, message, param="model", code="model_not_available")
        if job_request.method not in preset.methods:
            message = (
                f"The model {preset.name!r} is not available for fine-tuning with the method '{job_request.method}'."
            )
            raise ApiError(400, message, param="method.type", code="unsupported")
        requests.check_grader_of(job_request, preset)
        if self._runs and preset.pool == LOCAL and preset.fewest > (most := self._reconciler.queue.capacity()):
            message = TOO_MANY_DEVICES.format(preset.fewest, most)
            raise ApiError(400, message, param="model", code=DOES_NOT_FIT)
        epochs = job_request.hyperparameters["n_epochs"]
        if epochs != AUTO and int(epochs) > preset.most_epochs:
            message = f"Invalid n_epochs: the model {preset.name!r} takes {preset.most_epochs} at most."
            raise ApiError(
                400, message, param=f"method.{job_request.method}.hyperparameters.n_epochs", code="invalid_value"
            )
        if job_request.integrations and not self._has_wandb(caller.project):
            message = "This project has no key of Weights & Biases; an owner stores it first."
            raise ApiError(400, message, param="integrations", code="wandb_not_set_up")
        return preset, start

    @staticmethod
    def _row(caller: Caller, job_request: JobRequest, preset: Preset, start: str | None) -> Job:
        return Job(
            id=new_id("ftjob-"), created_at=unix_time(), organization=caller.organization, project=caller.project,
            key=caller.id, model=job_request.model, preset=preset.name, start=start, method=job_request.method,
            hyperparameters=dict(job_request.hyperparameters), training_file=job_request.training_file,
            validation_file=job_request.validation_file, suffix=job_request.suffix, seed=job_request.seed,
            integrations=job_request.integrations, grader=job_request.grader, meta=job_request.metadata,
            priority=preset.priority, state=State.VALIDATING, pool=preset.pool, devices=preset.devices,
        )  # fmt: skip

    @contextmanager
    def _snapshots(self, caller: Caller, job: Job) -> Iterator[JobFolder]:
        """Yield the folder of a new job with copies of its files, which may be deleted afterwards. The folder is removed if the job
        is not created."""
        folder = JobFolder.of(self._folder, job.id)
        folder.create()
        try:
            with self._database.session() as session:
                job.bytes = 0
                for param in ("training_file", "validation_file"):
                    name = getattr(job, param)
                    if name is None:
                        continue
                    file = self._files.of(session, caller.project, name, param)
                    if file.purpose != PURPOSE:
                        message = f"Invalid {param}: {name} has the purpose {file.purpose!r}, not {PURPOSE!r}."
                        raise ApiError(400, message, param=param, code="invalid_file_purpose")
                    job.bytes += file.bytes
                    try:
                        self._files.snapshot(file, folder.snapshot(param))
                    except FileNotFoundError:  # it has just been deleted
                        raise ApiError(
                            400, f"No such File object: {name}", param=param, code="file_not_found"
                        ) from None
            yield folder
        except BaseException:
            folder.remove()
            raise

    def _check_limits(self, session: Session, caller: Caller) -> None:
        """Raises ApiError if too many jobs are waiting already."""
        self._database.exclusive(session, f"jobs {caller.organization}")
        queue = self._presets().queue
        for whose, limits in (("organization", queue.of(caller.organization)), ("key", queue.key)):
            who = caller.organization if whose == "organization" else caller.id
            if limits.waiting is None or self._store.waiting(session, **{whose: who}) < limits.waiting:
                continue
            message = (
                f"{limits.waiting} jobs of this {whose} wait or are paused already; create more when some have ended."
            )
            headers = {"retry-after": "60", "x-should-retry": "false"}
            raise ApiError(429, message, code="rate_limit_exceeded", headers=headers)
