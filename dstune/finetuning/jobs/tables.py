"""Tables of jobs and tuned models. A change here needs a migration."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, Float, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, undefer

from dstune.finetuning.tables import Numbered
from dstune.serve.store.tables import Table


class Job(Numbered):
    """A job as its client sees it, and the reconciler's knowledge of its process."""

    __tablename__ = "finetuning_jobs"
    organization: Mapped[str] = mapped_column(String(64))
    project: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key: Mapped[str] = mapped_column(String(32))
    model: Mapped[str] = mapped_column(Text)
    """The model in the request: a public name of models.yaml, or a tuned model."""
    preset: Mapped[str] = mapped_column(String(64))
    start: Mapped[str | None] = mapped_column(Text, default=None)
    """The tuned model that training starts from."""
    method: Mapped[str] = mapped_column(String(32))
    hyperparameters: Mapped[dict[str, Any]] = mapped_column(JSON)
    """From the request, with "auto" replaced by numbers once the files have been validated."""
    grader: Mapped[dict[str, Any] | None] = mapped_column(JSON, default=None, deferred=True)
    """The grader of a reinforcement job; loaded only on demand (`WITH_GRADER`), since it may be large."""
    training_file: Mapped[str] = mapped_column(String(64))
    validation_file: Mapped[str | None] = mapped_column(String(64), default=None)
    suffix: Mapped[str | None] = mapped_column(Text, default=None)
    seed: Mapped[int] = mapped_column(BigInteger)
    integrations: Mapped[list[dict[str, Any]]] = mapped_column(JSON, default=list)
    meta: Mapped[dict[str, str] | None] = mapped_column("metadata", JSON, default=None)
    priority: Mapped[int] = mapped_column(Integer, default=0)

    state: Mapped[str] = mapped_column(String(32))
    version: Mapped[int] = mapped_column(Integer, default=0)
    """Counts the changes of state."""
    active: Mapped[bool] = mapped_column(Boolean, default=False)
    """Whether its process may be alive and it holds devices. True for a cancelled job that is still saving."""
    pool: Mapped[str] = mapped_column(String(32), default="local")
    """The pool it takes devices from: `local`, or the launcher whose queue it is in."""
    devices: Mapped[int] = mapped_column(Integer, default=1)
    """The number of devices it has, or had in its newest attempt; before the first one, the number in its preset."""
    taken: Mapped[list[int]] = mapped_column(JSON, default=list)
    """Indices of its local devices."""
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    """How often its training was started."""
    idle_attempts: Mapped[int] = mapped_column(Integer, default=0)
    """Starts in a row that did not get beyond the step where they began."""
    attempt_step: Mapped[int] = mapped_column(Integer, default=0)
    """The step at which this attempt began."""

    rows: Mapped[int | None] = mapped_column(BigInteger, default=None)
    base_lr: Mapped[float | None] = mapped_column(Float, default=None)
    """The base learning rate of the multiplier."""
    total_steps: Mapped[int | None] = mapped_column(BigInteger, default=None)
    last_step: Mapped[int] = mapped_column(BigInteger, default=0)
    """The newest step that became an event."""
    step_seconds: Mapped[float | None] = mapped_column(Float, default=None)
    """From the plan; measured once the job runs."""
    memory_gib: Mapped[float | None] = mapped_column(Float, default=None)
    """Per rank, from the plan."""
    bytes: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    """Size of its folder when last measured; it counts towards the project's space."""
    queued_at: Mapped[int | None] = mapped_column(BigInteger, default=None)
    started_at: Mapped[float | None] = mapped_column(Float, default=None)
    """Start of the current attempt."""
    device_seconds: Mapped[float] = mapped_column(Float, default=0.0)
    """Of finished attempts."""
    estimated_finish: Mapped[int | None] = mapped_column(BigInteger, default=None)
    finished_at: Mapped[int | None] = mapped_column(BigInteger, default=None)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True), default=None)
    fine_tuned_model: Mapped[str | None] = mapped_column(Text, default=None)
    result_file: Mapped[str | None] = mapped_column(String(64), default=None)
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger, default=None)
    __table_args__ = (
        Index("finetuning_jobs_page", "project", "created_at", "number"),
        Index("finetuning_jobs_state", "state", "organization"),
        Index("finetuning_jobs_active", "active"),
    )


WITH_GRADER = undefer(Job.grader)


class JobMetadata(Table):
    """One pair of a job's metadata, for filtering."""

    __tablename__ = "finetuning_metadata"
    job: Mapped[str] = mapped_column(ForeignKey("finetuning_jobs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(String(512))
    __table_args__ = (Index("finetuning_metadata_pair", "name", "value"),)


class JobEvent(Numbered):
    """An event of a job for its client. Each training step has at most one."""

    __tablename__ = "finetuning_events"
    job: Mapped[str] = mapped_column(ForeignKey("finetuning_jobs.id", ondelete="CASCADE"))
    level: Mapped[str] = mapped_column(String(8), default="info")
    type: Mapped[str] = mapped_column(String(16), default="message")
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    step: Mapped[int | None] = mapped_column(BigInteger, default=None)
    """For metric events."""
    __table_args__ = (
        UniqueConstraint("job", "step", name="finetuning_events_step"),
        Index("finetuning_events_page", "job", "created_at", "number"),
    )


class JobCheckpoint(Numbered):
    """A step of a job whose model can be used."""

    __tablename__ = "finetuning_checkpoints"
    job: Mapped[str] = mapped_column(ForeignKey("finetuning_jobs.id", ondelete="CASCADE"))
    step: Mapped[int] = mapped_column(BigInteger)
    model: Mapped[str] = mapped_column(Text)
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    __table_args__ = (
        UniqueConstraint("job", "step", name="finetuning_checkpoints_step"),
        Index("finetuning_checkpoints_page", "job", "created_at", "number"),
    )


class TunedModel(Numbered):
    """A model that a job has created; the last part of its public name is its id."""

    __tablename__ = "finetuning_models"
    name: Mapped[str] = mapped_column(String(512), unique=True)
    organization: Mapped[str] = mapped_column(String(64))
    project: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    job: Mapped[str] = mapped_column(ForeignKey("finetuning_jobs.id"))
    preset: Mapped[str] = mapped_column(String(64))
    step: Mapped[int | None] = mapped_column(BigInteger, default=None)
    """The step of a checkpoint; None for the final model."""
    folder: Mapped[str] = mapped_column(Text)
    """The export's path inside the job's folder."""
    deleted_at: Mapped[int | None] = mapped_column(BigInteger, default=None)
    __table_args__ = (Index("finetuning_models_page", "project", "created_at", "number"),)


class ModelPermission(Numbered):
    """Lets another project of the organization use a model."""

    __tablename__ = "finetuning_permissions"
    model: Mapped[str] = mapped_column(String(512))
    project: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key: Mapped[str] = mapped_column(String(32))
    __table_args__ = (UniqueConstraint("model", "project", name="finetuning_permissions_pair"),)


class Lease(Table):
    """Which process runs the reconciler, and until when."""

    __tablename__ = "leases"
    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64))
    until: Mapped[float] = mapped_column(Float)
