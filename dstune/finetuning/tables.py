"""Tables of the fine-tuning API beside those of `store/tables.py`. A change here needs a migration."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from dstune.serve.store.tables import Table

BIG = BigInteger().with_variant(Integer, "sqlite")
"""A number that counts up by itself needs SQLite's own kind of integer."""


class Numbered(Table):
    """A row with a public id, in the order in which rows were made: `created_at` has whole seconds, so that several share
    one. Pages sort by both."""

    __abstract__ = True
    number: Mapped[int] = mapped_column(BIG, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[int] = mapped_column(BigInteger)


class Blob(Table):
    """Bytes that lie in the store once, however many files of a project have them."""

    __tablename__ = "blobs"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    sha256: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int] = mapped_column(BigInteger)
    references: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[int] = mapped_column(BigInteger)
    __table_args__ = (UniqueConstraint("project", "sha256", name="blobs_content"),)


class File(Numbered):
    """A file as its project sees it. A deleted one keeps its place in pages and nothing else."""

    __tablename__ = "files"
    project: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key: Mapped[str] = mapped_column(String(32))
    blob: Mapped[str | None] = mapped_column(ForeignKey("blobs.id"), default=None)
    filename: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[int | None] = mapped_column(BigInteger, default=None, index=True)
    deleted_at: Mapped[int | None] = mapped_column(BigInteger, default=None)
    __table_args__ = (Index("files_page", "project", "created_at", "number"), Index("files_blob", "blob"))


class Upload(Table):
    """A file that comes in parts."""

    __tablename__ = "uploads"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key: Mapped[str] = mapped_column(String(32))
    filename: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(String(32))
    mime_type: Mapped[str] = mapped_column(String(256))
    bytes: Mapped[int] = mapped_column(BigInteger)
    file_seconds: Mapped[int | None] = mapped_column(BigInteger, default=None)
    """How long its file lives."""
    status: Mapped[str] = mapped_column(String(16))
    file: Mapped[str | None] = mapped_column(String(64), default=None)
    created_at: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[int] = mapped_column(BigInteger, index=True)


class Part(Table):
    """A part of an upload; its bytes lie under its id."""

    __tablename__ = "parts"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    upload: Mapped[str] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"), index=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[int] = mapped_column(BigInteger)


class Creation(Table):
    """What a request has made, so that its repetition finds it."""

    __tablename__ = "creations"
    number: Mapped[int] = mapped_column(BIG, primary_key=True, autoincrement=True)
    project: Mapped[str] = mapped_column(String(64))
    key: Mapped[str] = mapped_column(String(32))
    route: Mapped[str] = mapped_column(String(64))
    idempotency_key: Mapped[str | None] = mapped_column(String(256), default=None)
    digest: Mapped[str] = mapped_column(String(64))
    """SHA-256 of what was asked."""
    object: Mapped[str] = mapped_column(String(64))
    retried: Mapped[bool] = mapped_column(default=False)
    created: Mapped[float] = mapped_column(Float)
    __table_args__ = (
        UniqueConstraint("project", "route", "idempotency_key", name="creations_idempotency"),
        Index("creations_digest", "project", "key", "route", "digest"),
        Index("creations_created", "created"),
    )


class Usage(Table):
    """What a key has used, beside the answers that `answers` counts."""

    __tablename__ = "usage"
    number: Mapped[int] = mapped_column(BIG, primary_key=True, autoincrement=True)
    project: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key: Mapped[str] = mapped_column(String(32))
    kind: Mapped[str] = mapped_column(String(32))
    """`training`."""
    object: Mapped[str] = mapped_column(String(128))
    """The id of the job."""
    model: Mapped[str] = mapped_column(Text)
    tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    device_seconds: Mapped[float] = mapped_column(Float, default=0.0)
    cost: Mapped[float] = mapped_column(Float, default=0.0)
    created_at: Mapped[int] = mapped_column(BigInteger)
    __table_args__ = (Index("usage_time", "project", "created_at"),)


class AuditEntry(Numbered):
    """Who did what."""

    __tablename__ = "audit"
    organization: Mapped[str] = mapped_column(String(64))
    project: Mapped[str] = mapped_column(String(64))
    key: Mapped[str] = mapped_column(String(32))
    """Empty for the server itself."""
    request: Mapped[str] = mapped_column(String(64), default="")
    action: Mapped[str] = mapped_column(String(64))
    object: Mapped[str] = mapped_column(Text)
    detail: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    __table_args__ = (Index("audit_page", "organization", "created_at", "number"),)


class WebhookEndpoint(Numbered):
    """Who is told of events."""

    __tablename__ = "webhook_endpoints"
    project: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str] = mapped_column(Text)
    url: Mapped[str] = mapped_column(Text)
    event_types: Mapped[list[str]] = mapped_column(JSON)
    secret: Mapped[str] = mapped_column(Text)
    """Encrypted, as the one before it."""
    old_secret: Mapped[str | None] = mapped_column(Text, default=None)
    old_until: Mapped[int | None] = mapped_column(BigInteger, default=None)
    hint: Mapped[str] = mapped_column(String(16))
    updated_at: Mapped[int] = mapped_column(BigInteger)
    deleted_at: Mapped[int | None] = mapped_column(BigInteger, default=None)


class Delivery(Table):
    """An event on its way to an endpoint."""

    __tablename__ = "deliveries"
    number: Mapped[int] = mapped_column(BIG, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64))
    """Of the event."""
    endpoint: Mapped[str] = mapped_column(String(64))
    body: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(String(16))
    """`waiting`, `delivered`, `failed` or `dropped`."""
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    next_at: Mapped[float] = mapped_column(Float)
    status: Mapped[int | None] = mapped_column(Integer, default=None)
    created: Mapped[float] = mapped_column(Float, default=time.time)
    __table_args__ = (Index("deliveries_due", "state", "next_at"),)


class Batch(Numbered):
    """Requests in a file, answered one after the other."""

    __tablename__ = "batches"
    project: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key: Mapped[str] = mapped_column(String(32))
    endpoint: Mapped[str] = mapped_column(String(64))
    input_file: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16), index=True)
    details: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    """Metadata, counts, times and files, as the API shows them."""
    output_seconds: Mapped[int | None] = mapped_column(BigInteger, default=None)
    lease_until: Mapped[float] = mapped_column(Float, default=0.0)
    """Until when the server that works on it keeps it."""
    __table_args__ = (Index("batches_page", "project", "created_at", "number"),)


class Secret(Table):
    """A secret of a project, encrypted with the server's own key."""

    __tablename__ = "secrets"
    project: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    """`wandb`."""
    value: Mapped[str] = mapped_column(Text)
    created_at: Mapped[int] = mapped_column(BigInteger)
