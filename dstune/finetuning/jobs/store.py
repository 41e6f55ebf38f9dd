"""Stores jobs in the database.

Each change of a job's state is one transaction, together with its events and everything else that belongs to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session

from dstune.finetuning import pages
from dstune.finetuning.ids import new_id, unix_time
from dstune.finetuning.jobs.folder import JobFolder
from dstune.finetuning.jobs.states import TERMINAL, Change, State, after
from dstune.finetuning.jobs.tables import WITH_GRADER, Job, JobCheckpoint, JobEvent, JobMetadata
from dstune.serve.errors import ApiError
from dstune.serve.store.database import Database

WAITING = (State.VALIDATING, State.QUEUED, State.PAUSING, State.PAUSED)
"""Paused jobs count too; otherwise a client could create any number of them."""
Ended = Callable[[Session, Job], None]
"""Called inside the transaction that ends a job."""


@dataclass(frozen=True)
class Message:
    """An event that is not a metric."""

    text: str
    level: str = "info"


class JobStore:
    def __init__(self, database: Database):
        self.database = database
        self.ended: list[Ended] = []
        self.wake: Callable[[], None] = lambda: None
        """Wakes the reconciler."""

    # -- making and changing

    def add(self, session: Session, job: Job, messages: Iterable[str]) -> None:
        session.add(job)
        session.flush()
        for name, value in (job.meta or {}).items():
            session.add(JobMetadata(job=job.id, name=name, value=value))
        for text in messages:
            note(session, job, Message(text))

    def lock_row(self, session: Session, job: str) -> Job:
        """Return the row, locked until this transaction ends."""
        row = session.scalar(select(Job).where(Job.id == job).with_for_update())
        assert row is not None, "rows of jobs are not removed"
        return row

    def change(
        self,
        session: Session,
        job: Job,
        change: Change,
        messages: Iterable[Message] = (),
        *,
        repeated: bool = False,
        **values: Any,
    ) -> bool:
        """Change the state of a job: the only place where that happens. Returns whether it changed: a client may request the state
        that it already has. Raises ApiError if the state does not allow the change."""
        state = after(State(job.state), change, repeated=repeated)
        if state is None:
            return False
        job.state, job.version = state, job.version + 1
        for name, value in values.items():
            setattr(job, name, value)
        if state in TERMINAL:
            job.finished_at = unix_time()
        if state is not State.RUNNING:
            job.estimated_finish = None
        if state is State.QUEUED and job.queued_at is None:
            job.queued_at = unix_time()
        for message in messages:
            note(session, job, message)
        if state in TERMINAL:
            for hook in self.ended:
                hook(session, job)
        return True

    def request_change(
        self, project: str, job: str, change: Change, *, repeated: bool, message: str,
        also: Callable[[Session], None] = lambda session: None,
    ) -> Job:  # fmt: skip
        """Cancel, pause or resume a job at a client's request, and return it. also: called in the same transaction if the job
        changes. Raises ApiError."""
        with self.database.writing.begin() as session:
            row = self.of(session, project, job, lock=True)
            if self.change(session, row, change, [Message(message)], repeated=repeated):
                also(session)
        self.wake()
        return row

    def measure(self, job: str, folder: JobFolder) -> None:
        """Record the size of a job's folder."""
        size = folder.size()
        with self.database.writing.begin() as session:
            session.execute(update(Job).where(Job.id == job).values(bytes=size))

    # -- reading

    def of(self, session: Session, project: str, job: str, *, lock: bool = False) -> Job:
        """Return a job of a project. Raises ApiError 404 if there is none."""
        query = select(Job).options(WITH_GRADER).where(Job.project == project, Job.id == job)
        row = session.scalar(query.with_for_update() if lock else query)
        if row is None:
            message = f"Could not find fine tune: {job[:128]}"
            raise ApiError(404, message, param="fine_tune_id", code="fine_tune_not_found")
        return row

    def read(self, job: str) -> Job:
        with self.database.session() as session:
            return session.scalars(select(Job).options(WITH_GRADER).where(Job.id == job)).one()

    def page(
        self, project: str, page: pages.Page, metadata: Mapping[str, str] | None, *, without_metadata: bool = False
    ) -> tuple[list[Job], bool]:
        """Return a page of the jobs that have all these pairs of metadata. without_metadata: only jobs that have none."""
        filters = []
        for name, value in (metadata or {}).items():
            pair = select(JobMetadata.job).where(JobMetadata.name == name, JobMetadata.value == value)
            filters.append(Job.id.in_(pair))
        if without_metadata:
            filters.append(Job.id.not_in(select(JobMetadata.job)))
        with self.database.session() as session:
            return pages.rows_of(session, Job, page, [Job.project == project], *filters, options=[WITH_GRADER])

    def events(self, project: str, job: str, page: pages.Page) -> tuple[list[JobEvent], bool]:
        with self.database.session() as session:
            self.of(session, project, job)
            return pages.rows_of(session, JobEvent, page, [JobEvent.job == job])

    def checkpoints(self, project: str, job: str, page: pages.Page) -> tuple[list[JobCheckpoint], bool]:
        with self.database.session() as session:
            self.of(session, project, job)
            return pages.rows_of(session, JobCheckpoint, page, [JobCheckpoint.job == job])

    # -- for the reconciler

    def unfinished(self) -> list[Job]:
        """Return the jobs that may need action; jobs that only wait for devices or a resume are excluded."""
        own_states = (State.VALIDATING, State.RUNNING, State.PAUSING)
        with self.database.session() as session:
            query = select(Job).where(or_(Job.state.in_(own_states), Job.active.is_(True))).order_by(Job.number)
            return list(session.scalars(query))

    def queued(self) -> list[Job]:
        with self.database.session() as session:
            query = select(Job).where(Job.state == State.QUEUED, Job.active.is_(False)).order_by(Job.number)
            return list(session.scalars(query))

    def states(self) -> dict[str, tuple[str, int]]:
        """Return the state of each job, and the size of its folder in bytes (0: never measured)."""
        with self.database.session() as session:
            return {row.id: (row.state, row.bytes) for row in session.execute(select(Job.id, Job.state, Job.bytes))}

    def used(self, since: float) -> dict[str, float]:
        """Return device-seconds by organization, of finished attempts, for jobs that ran after `since`."""
        query = select(Job.organization, func.sum(Job.device_seconds)).where(Job.started_at >= since)
        with self.database.session() as session:
            return {
                organization: float(seconds)
                for organization, seconds in session.execute(query.group_by(Job.organization))
            }

    @staticmethod
    def bytes_of(session: Session, project: str) -> int:
        """Return the size of a project's job folders in bytes."""
        return session.scalar(select(func.coalesce(func.sum(Job.bytes), 0)).where(Job.project == project)) or 0

    def waiting(self, session: Session, **owner: str) -> int:
        """Return how many jobs wait to start or to be resumed. owner: `organization` or `key`."""
        query = select(func.count()).select_from(Job).where(Job.state.in_(WAITING))
        for name, value in owner.items():
            query = query.where(getattr(Job, name) == value)
        return int(session.scalar(query) or 0)


def note(session: Session, job: Job, message: Message) -> None:
    session.add(
        JobEvent(id=new_id("ftevent-"), created_at=unix_time(), job=job.id, level=message.level, message=message.text)
    )


def metric(session: Session, job: Job, step: int, text: str, data: Mapping[str, Any]) -> None:
    session.add(
        JobEvent(
            id=new_id("ftevent-"),
            created_at=unix_time(),
            job=job.id,
            type="metrics",
            message=text,
            data=dict(data),
            step=step,
        )
    )
