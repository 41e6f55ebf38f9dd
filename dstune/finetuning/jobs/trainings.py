"""The training phase of a job: reports its steps as events, and handles each way in which its process can end."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from dstune.core.errors import EXIT_DONE, EXIT_PREEMPTED, EXIT_USER
from dstune.finetuning.jobs import metrics
from dstune.finetuning.jobs.actions import INTERNAL, JobActions
from dstune.finetuning.jobs.folder import NOW, SAVE, JobFolder, read
from dstune.finetuning.jobs.states import TERMINAL, Change, State
from dstune.finetuning.jobs.store import Message, metric
from dstune.finetuning.jobs.tables import Job

log = logging.getLogger("dstune.serve")

MOST_IDLE = 8
"""After this many starts in a row without a new step, a job has failed."""
MEASURE_SECONDS = 15.0
"""Interval of measuring a running job's folder."""
DATA_KEYS = {"training_file": "data.train", "validation_file": "data.validation"}


class Trainings:
    def __init__(self, actions: JobActions):
        self._actions = actions

    def watch(self, job: Job) -> None:
        """Report the new steps of a training, and handle its end."""
        actions, folder, memory = self._actions, self._actions.folder(job), self._actions.memory(job)
        is_alive = actions.launcher.is_alive(folder)
        steps = memory.reader.read()
        self._store_events(job, steps, ended=not is_alive)
        if is_alive:
            if job.state == State.PAUSING:
                actions.request_end(folder, SAVE)
            if memory.measured_at is None or time.monotonic() - memory.measured_at >= MEASURE_SECONDS:
                memory.measured_at = time.monotonic()
                actions.store.measure(job.id, folder)
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
            actions.fail(job, "server_error", INTERNAL, None)

    def wind_down(self, job: Job) -> None:
        """End the process of a job that is cancelled, paused or over, and account for its attempt."""
        actions, folder = self._actions, self._actions.folder(job)
        if actions.launcher.is_alive(folder):
            actions.request_end(folder, NOW if job.state == State.CANCELLED else SAVE)
            return
        self._store_events(job, actions.memory(job).reader.read(), ended=True)
        with actions.store.database.writing.begin() as session:
            row = actions.store.lock_row(session, job.id)
            if row.active:
                actions.account(row)
                if row.state in TERMINAL:
                    actions.results.count(session, row)
        if job.state in TERMINAL:
            actions.clean_up(job)

    def _store_events(self, job: Job, steps: Sequence[metrics.Step], *, ended: bool) -> None:
        """Store new steps as events. The newest one waits for its evaluation, which is logged in a row of its own."""
        self._report_rewind(job, steps[-1].number if steps else 0, ended=ended)
        complete_steps = steps if ended or job.validation_file is None else steps[:-1]
        new_steps = [step for step in complete_steps if step.number > job.last_step and "train_loss" in step.values]
        if not new_steps:
            return
        per_epoch = metrics.steps_per_epoch(steps)
        total = job.total_steps or 0
        if per_epoch is not None:
            total = per_epoch * int(job.hyperparameters["n_epochs"])
        durations = sorted(step.seconds for step in steps[-20:] if step.seconds)
        median_seconds = durations[len(durations) // 2] if durations else job.step_seconds
        store = self._actions.store
        with store.database.writing.begin() as session:
            row = store.lock_row(session, job.id)
            for step in new_steps:
                if step.number <= row.last_step:
                    continue
                row.last_step = step.number
                if metrics.becomes_event(step.number, total, ends_epoch=step.ends_epoch):
                    metric(session, row, step.number, metrics.message_of(step, total), metrics.data_of(step, total))
            row.total_steps, row.step_seconds = total, median_seconds
            if row.state == State.RUNNING and median_seconds is not None:
                row.estimated_finish = round(time.time() + median_seconds * max(0, total - row.last_step))
        job.last_step, job.total_steps, job.step_seconds = row.last_step, total, median_seconds

    def _report_rewind(self, job: Job, reached: int, *, ended: bool) -> None:
        """Warn that a training has gone back to an earlier step: it continues from a checkpoint, possibly within the same
        attempt."""
        memory = self._actions.memory(job)
        if reached >= job.last_step:
            memory.is_rewound = False
        elif reached and not ended and not memory.is_rewound:
            memory.is_rewound = True
            self._actions.warn(
                job,
                f"The training goes on from its checkpoint of step {reached}; it had reached step {job.last_step}",
            )

    def _handle_lost(self, job: Job, steps: Sequence[metrics.Step], why: str) -> None:
        """Handle a job whose process has ended before the job was over."""
        if job.state == State.PAUSING:
            self._actions.end_attempt(job, Change.HALT, [Message("The job is paused")], exports=True)
            return
        reached = steps[-1].number if steps else 0
        idle = 0 if reached > job.attempt_step else job.idle_attempts + 1
        if idle >= MOST_IDLE:
            log.error("job %s was started %d times and does not come beyond step %d", job.id, job.attempt, reached)
            self._actions.fail(job, "server_error", INTERNAL, None)
            return
        message = Message(
            f"The job was interrupted at step {reached}: {why}. It goes on from its newest checkpoint", "warn"
        )
        self._actions.end_attempt(job, Change.LOSE, [message], idle_attempts=idle)

    def _complete(self, job: Job, folder: JobFolder, steps: Sequence[metrics.Step], ended: Mapping[str, Any]) -> None:
        """Publish the results of a training that has succeeded. ended: the content of `ended.json`."""
        actions = self._actions
        if not steps or steps[-1].number not in folder.exports():
            log.error("job %s completed without an export of its last step", job.id)
            actions.fail(job, "server_error", INTERNAL, None)
            return
        with actions.results.staged(steps) as staged, actions.store.database.writing.begin() as session:
            row = actions.store.lock_row(session, job.id)
            if row.state not in (State.RUNNING, State.PAUSING) or row.attempt != job.attempt:
                return  # cancelled in the meantime
            actions.account(row)
            result, model, messages = actions.results.complete(session, row, staged, folder, steps)
            actions.store.change(
                session, row, Change.COMPLETE, [Message(text) for text in messages],
                trained_tokens=int(ended.get("tokens") or steps[-1].tokens or 0), result_file=result, fine_tuned_model=model,
            )  # fmt: skip
        actions.clean_up(job)
        actions.results.published()

    def _handle_refusal(self, job: Job, ended: Mapping[str, Any], steps: Sequence[metrics.Step]) -> None:
        """Handle exit code 2: an error in the client's rows, a second launch of the same directory, or the operator's preset."""
        problems = ended.get("problems") or []
        where = str(problems[0].get("where", "")) if problems else ""
        if where == "run.dir":
            self._handle_lost(job, steps, "another process of it was running still")
            return
        folder = self._actions.folder(job)
        for param in ("training_file", "validation_file"):
            file = str(folder.of_param(param))
            if where.startswith(file) or where == DATA_KEYS[param]:
                line = where.removeprefix(file).lstrip(":")
                place = f" line {line}" if line.isdigit() else ""
                reason = str(problems[0].get("reason", "")).replace(str(folder.path), "")
                self._actions.fail(job, f"invalid_{param}", f"{getattr(job, param)}{place}: {reason}", param)
                return
        log.error("job %s was refused: %s", job.id, str(ended.get("reason"))[:2000])
        self._actions.fail(job, "server_error", INTERNAL, None)
