"""Tables of jobs and of the models that they make. A change here needs a migration."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, Float, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, undefer

from dstune.finetuning.tables import Numbered
from dstune.serve.store.tables import Table


class Job(Numbered):
    """A job as its client sees it, and what the reconciler knows of its process."""

    __tablename__ = "finetuning_jobs"
    organization: Mapped[str] = mapped_column(String(64))
    project: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key: Mapped[str] = mapped_column(String(32))
    model: Mapped[str] = mapped_column(Text)
    """As the request names it: a public name of models.yaml, or a tuned model."""
    preset: Mapped[str] = mapped_column(String(64))
    start: Mapped[str | None] = mapped_column(Text, default=None)
    """The tuned model that training starts from."""
    method: Mapped[str] = mapped_column(String(32))
    hyperparameters: Mapped[dict[str, Any]] = mapped_column(JSON)
    """As given, and numbers in the place of "auto" once the files are read."""
    grader: Mapped[dict[str, Any] | None] = mapped_column(JSON, default=None, deferred=True)
    """Of a reinforcement job, as given; read where it is asked for (`WITH_GRADER`): it may be large."""
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
    """Whether a process of it may be alive, and its devices are taken. True for a cancelled job that is still saving."""
    pool: Mapped[str] = mapped_column(String(32), default="local")
    """What it takes devices from: `local`, or the launcher whose queue it is in."""
    devices: Mapped[int] = mapped_column(Integer, default=1)
    """How many it has, or had in its newest attempt; before the first one, how many its preset names."""
    taken: Mapped[list[int]] = mapped_column(JSON, default=list)
    """Numbers of the local devices that it has."""
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    """Starts of its training."""
    idle_attempts: Mapped[int] = mapped_column(Integer, default=0)
    """Starts in a row that have not come beyond the step where they began."""
    attempt_step: Mapped[int] = mapped_column(Integer, default=0)
    """The step that was reached when this attempt began."""

    rows: Mapped[int | None] = mapped_column(BigInteger, default=None)
    base_lr: Mapped[float | None] = mapped_column(Float, default=None)
    """The learning rate that the multiplier multiplies."""
    total_steps: Mapped[int | None] = mapped_column(BigInteger, default=None)
    last_step: Mapped[int] = mapped_column(BigInteger, default=0)
    """The newest step that became an event."""
    step_seconds: Mapped[float | None] = mapped_column(Float, default=None)
    """Of the plan, and measured once the job runs."""
    memory_gib: Mapped[float | None] = mapped_column(Float, default=None)
    """Of a rank, by the plan."""
    bytes: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    """Of its folder, as it was measured last: they count towards the space of its project."""
    queued_at: Mapped[int | None] = mapped_column(BigInteger, default=None)
    started_at: Mapped[float | None] = mapped_column(Float, default=None)
    """Of the present attempt."""
    device_seconds: Mapped[float] = mapped_column(Float, default=0.0)
    """Of attempts that are over."""
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
    """A pair of a job's metadata, to filter by."""

    __tablename__ = "finetuning_metadata"
    job: Mapped[str] = mapped_column(ForeignKey("finetuning_jobs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(String(512))
    __table_args__ = (Index("finetuning_metadata_pair", "name", "value"),)


class JobEvent(Numbered):
    """Something that a client reads of a job. Of a training step there is one at most."""

    __tablename__ = "finetuning_events"
    job: Mapped[str] = mapped_column(ForeignKey("finetuning_jobs.id", ondelete="CASCADE"))
    level: Mapped[str] = mapped_column(String(8), default="info")
    type: Mapped[str] = mapped_column(String(16), default="message")
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    step: Mapped[int | None] = mapped_column(BigInteger, default=None)
    """Of the events of metrics."""
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
    """A model that a job has made; its id is its public name's last part."""

    __tablename__ = "finetuning_models"
    name: Mapped[str] = mapped_column(String(512), unique=True)
    organization: Mapped[str] = mapped_column(String(64))
    project: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    job: Mapped[str] = mapped_column(ForeignKey("finetuning_jobs.id"))
    preset: Mapped[str] = mapped_column(String(64))
    step: Mapped[int | None] = mapped_column(BigInteger, default=None)
    """Of a checkpoint; None for the final model."""
    folder: Mapped[str] = mapped_column(Text)
    """Of the export, below the folder of the job."""
    deleted_at: Mapped[int | None] = mapped_column(BigInteger, default=None)
    __table_args__ = (Index("finetuning_models_page", "project", "created_at", "number"),)


class ModelPermission(Numbered):
    """A project that may use a model of another one of its organization."""

    __tablename__ = "finetuning_permissions"
    model: Mapped[str] = mapped_column(String(512))
    project: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key: Mapped[str] = mapped_column(String(32))
    __table_args__ = (UniqueConstraint("model", "project", name="finetuning_permissions_pair"),)


class Lease(Table):
    """Which process reconciles, until when."""

    __tablename__ = "leases"
    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64))
    until: Mapped[float] = mapped_column(Float)
