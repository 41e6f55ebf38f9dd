"""The first phase of a job: a process validates the client's files, then the job's configuration is written."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from dstune.finetuning.jobs import configuration, hyperparameters
from dstune.finetuning.jobs.actions import INTERNAL, JobActions
from dstune.finetuning.jobs.configuration import Plan
from dstune.finetuning.jobs.folder import NOW, JobFolder, read
from dstune.finetuning.jobs.planner import DOES_NOT_FIT, Estimate, Plans, does_not_fit
from dstune.finetuning.jobs.presets import Preset
from dstune.finetuning.jobs.process import VALIDATE
from dstune.finetuning.jobs.states import Change
from dstune.finetuning.jobs.store import Message
from dstune.finetuning.jobs.tables import Job

log = logging.getLogger("dstune.serve")

VALIDATORS = 2
"""Concurrent validations; each takes one core."""
MOST_VALIDATIONS = 5
"""After this many starts without a result, a job has failed."""


class Validations:
    """Validates the files of jobs. plans: checks whether jobs fit before they wait for devices; None skips the check."""

    def __init__(self, actions: JobActions, plans: Plans | None):
        self._actions, self._plans = actions, plans
        self._turns: dict[str, int] = {}
        """When each organization's files were last validated, as a counter."""

    def check(self, job: Job) -> bool:
        """Take over the result of a validation, or end one that takes too long. Returns whether it is still running."""
        folder = self._actions.folder(job)
        validation = read(folder.validated)
        if validation is not None:
            self._take_result(job, folder, validation)
            return False
        if not self._actions.launcher.is_alive(folder):
            return False
        limit = self._actions.presets().queue.validation_seconds
        if time.time() - folder.task.stat().st_mtime > limit:
            self._actions.request_end(folder, NOW)
            message = f"The files were not read within {limit:g} s: give fewer or shorter rows."
            self._actions.fail(job, "validation_timeout", message, "training_file")
            return False
        return True

    def start_next(self, unread: list[Job], running: int) -> None:
        """Start validations while fewer than VALIDATORS are running. unread: jobs whose files have no validation."""
        while unread and running < VALIDATORS:
            # Start with the organization that has waited longest, so that many jobs of one do not delay others.
            job = min(unread, key=lambda job: (self._turns.get(job.organization, 0), job.number))
            unread.remove(job)
            self._turns[job.organization] = max(self._turns.values(), default=0) + 1
            try:
                running += self._start(job)
            except Exception:
                log.exception("job %s: the validation of its files could not be started; it will be retried", job.id)

    def _start(self, job: Job) -> bool:
        """Start a process that validates a job's files. Returns whether it was started; if it cannot be, the job fails."""
        memory = self._actions.memory(job)
        memory.validations += 1
        if memory.validations > MOST_VALIDATIONS:
            self._actions.fail(job, "server_error", INTERNAL, None)
            return False
        preset = self._actions.preset_or_fail(job)
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
        return self._actions.launcher.start(self._actions.folder(job), task, {"CUDA_VISIBLE_DEVICES": ""})

    def _take_result(self, job: Job, folder: JobFolder, validation: Mapping[str, Any]) -> None:
        """Fail a job whose files are invalid or that does not fit its hardware; queue any other."""
        error = validation.get("error")
        if isinstance(error, Mapping):
            self._actions.fail(job, str(error["code"]), str(error["message"]), error.get("param"))
            return
        preset = self._actions.preset_or_fail(job)
        if preset is None:
            return
        estimate = Estimate(fits=True) if self._plans is None else self._plans.ask(preset, job.method)
        if estimate is None:
            return  # a plan is being made; the files have been validated already
        if not estimate.fits:
            self._actions.fail(job, DOES_NOT_FIT, does_not_fit(preset, estimate), "model")
            return
        try:
            if job.start:
                folder.keep_start(self._actions.results.folder_of(job.start))
        except (LookupError, FileNotFoundError):
            self._actions.fail(job, "model_not_available", f"The model {job.start} was deleted.", "model")
            return
        self._queue(job, folder, validation, preset, estimate)

    def _queue(
        self, job: Job, folder: JobFolder, validation: Mapping[str, Any], preset: Preset, estimate: Estimate
    ) -> None:
        """Write the configuration of a validated job, and queue the job."""
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
            grader=self._actions.store.read(job.id).grader,
        )
        configuration.write(plan, preset, folder)
        messages = [Message(text, "warn") for text in validation.get("warnings", [])]
        messages.append(Message("Files validated, moving job to queued state"))
        values = {
            "hyperparameters": resolved,
            "rows": rows,
            "total_steps": hyperparameters.steps(rows, resolved)[1],
            "base_lr": preset.base_rate(job.method),
            "pool": preset.pool,
            "devices": preset.devices,
        }
        if self._plans is not None:
            seconds = estimate.row_seconds
            values["step_seconds"] = None if seconds is None else seconds * int(resolved["batch_size"])
            values["memory_gib"] = estimate.memory_gib
        self._actions.memory(job).validations = 0
        self._actions.change(job, Change.VALIDATED, messages, **values)
        self._actions.store.measure(job.id, folder)
