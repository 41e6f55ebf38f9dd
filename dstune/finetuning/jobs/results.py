"""Publishes the results of a job: its results file, its models and its checkpoints.

Files are written before the database rows that name them, so a row never names a file that does not exist.
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from dstune.finetuning.blobs import Staged
from dstune.finetuning.files import Files
from dstune.finetuning.ids import new_id, unix_time
from dstune.finetuning.jobs import metrics
from dstune.finetuning.jobs.folder import JobFolder
from dstune.finetuning.jobs.metrics import Step
from dstune.finetuning.jobs.presets import Presets
from dstune.finetuning.jobs.tables import Job, JobCheckpoint, TunedModel
from dstune.finetuning.models.names import new_name
from dstune.finetuning.tables import Usage
from dstune.serve.store.database import Database
from dstune.serve.store.tables import Organization

PURPOSE = "fine-tune-results"


class Results:
    def __init__(self, database: Database, files: Files, jobs: Path, presets: Callable[[], Presets]):
        """jobs: the parent of the job folders."""
        self._database, self._files, self._jobs, self._presets = database, files, jobs, presets
        self.published: Callable[[], None] = lambda: None
        """Called after models have been added."""

    @contextmanager
    def staged(self, steps: Sequence[Step]) -> Iterator[Staged]:
        """Stage the results file on disk."""
        content = metrics.results_csv(steps)
        if self._presets().results == "base64":
            content = base64.b64encode(content)
        staged = self._files.stage()
        try:
            staged.write(content)
            staged.close()
            yield staged
        finally:
            staged.discard()

    def complete(
        self, session: Session, job: Job, staged: Staged, folder: JobFolder, steps: Sequence[Step]
    ) -> tuple[str, str, list[str]]:
        """Store the results file, the checkpoints and the model of a succeeded job. Returns the file's id, the model's name and the
        messages of the job's events."""
        file = self._files.add(
            session,
            staged,
            project=job.project,
            key=job.key,
            filename="step_metrics.csv",
            purpose=PURPOSE,
            is_server_made=True,
        )
        last = steps[-1].number
        messages = self._checkpoints(session, job, folder, steps, without=last)
        model = self._model(session, job, folder.exports()[last], None)
        self._checkpoint(session, job, steps[-1], model)
        return (
            file.id,
            model,
            [*messages, f"New fine-tuned model created: {model}", "The job has successfully completed"],
        )

    def pause(self, session: Session, job: Job, folder: JobFolder, steps: Sequence[Step]) -> list[str]:
        """Store the checkpoints of a paused job. Returns the messages of the job's events."""
        return self._checkpoints(session, job, folder, steps, without=None)

    def _checkpoints(
        self, session: Session, job: Job, folder: JobFolder, steps: Sequence[Step], *, without: int | None
    ) -> list[str]:
        noted_steps = set(session.scalars(select(JobCheckpoint.step).where(JobCheckpoint.job == job.id)))
        by_number = {step.number: step for step in steps}
        messages = []
        for number, path in folder.exports().items():
            if number in noted_steps or number == without:
                continue
            name = self._model(session, job, path, number)
            self._checkpoint(session, job, by_number.get(number, Step(number)), name)
            messages.append(f"Checkpoint created at step {number} with Snapshot ID: {name}")
        return messages

    def _model(self, session: Session, job: Job, path: Path, step: int | None) -> str:
        organization = session.get(Organization, job.organization)
        name = new_name(job.preset, organization.name if organization else job.organization, job.suffix, step)
        session.add(
            TunedModel(
                id=new_id("model-"), created_at=unix_time(), name=name, organization=job.organization, project=job.project,
                job=job.id, preset=job.preset, step=step, folder=str(path.relative_to(self._jobs)),
            )
        )  # fmt: skip
        return name

    @staticmethod
    def _checkpoint(session: Session, job: Job, step: Step, model: str) -> None:
        earlier = session.scalar(
            select(JobCheckpoint).where(JobCheckpoint.job == job.id, JobCheckpoint.step == step.number)
        )
        if earlier is None:
            session.add(
                JobCheckpoint(
                    id=new_id("ftckpt_"), created_at=unix_time(), job=job.id, step=step.number, model=model,
                    metrics=dict(step.values),
                )
            )  # fmt: skip
            session.flush()  # keeps the order of their steps, since several are created in the same second

    def count(self, session: Session, job: Job) -> None:
        """Record the usage of a job that is over, however it ended."""
        if not job.device_seconds:
            return
        preset = self._presets().models.get(job.preset)
        price = preset.price if preset else 0.0
        session.add(
            Usage(
                project=job.project, key=job.key, kind="training", object=job.id, model=job.model,
                tokens=job.trained_tokens or 0, device_seconds=job.device_seconds,
                cost=job.device_seconds / 3600 * price, created_at=unix_time(),
            )
        )  # fmt: skip

    def folder_of(self, model: str) -> Path:
        """Return the export folder of an existing tuned model. Raises LookupError."""
        with self._database.session() as session:
            row = session.scalar(select(TunedModel).where(TunedModel.name == model, TunedModel.deleted_at.is_(None)))
        if row is None or not (self._jobs / row.folder).is_dir():
            raise LookupError(f"the model {model} was deleted")
        return self._jobs / row.folder

    def remove_unneeded_files(self, folder: JobFolder) -> None:
        """Remove what a finished job does not need: its rows and answers to them, its grader, optimizer states, and exports that no
        model uses."""
        for path in (folder.run / "checkpoints", folder.start):
            shutil.rmtree(path, ignore_errors=True)
        with self._database.session() as session:
            listed = (TunedModel.job == folder.path.name, TunedModel.deleted_at.is_(None))
            used_folders = set(session.scalars(select(TunedModel.folder).where(*listed)))
        for path in folder.exports().values():
            if str(path.relative_to(self._jobs)) not in used_folders:
                shutil.rmtree(path, ignore_errors=True)
        for path in folder.client_rows:  # removed last: `Reconciler._sweep` calls this while any of them exists
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
