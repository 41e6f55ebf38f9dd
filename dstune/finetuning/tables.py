"""Tables of the fine-tuning API, in addition to those of `store/tables.py`. A change here needs a migration."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from dstune.serve.store.tables import Table

BIG = BigInteger().with_variant(Integer, "sqlite")
"""SQLite only auto-increments its own integer type."""


class Numbered(Table):
    """A row with a public id and a sequence number. Several rows may share `created_at`, which is in whole seconds, so pages sort
    by both."""

    __abstract__ = True
    number: Mapped[int] = mapped_column(BIG, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[int] = mapped_column(BigInteger)


class Blob(Table):
    """Bytes that are stored once, however many files of a project contain them."""

    __tablename__ = "blobs"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    sha256: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int] = mapped_column(BigInteger)
    references: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[int] = mapped_column(BigInteger)
    __table_args__ = (UniqueConstraint("project", "sha256", name="blobs_content"),)


class File(Numbered):
    """A file as its project sees it. A deleted one only keeps its place in pages."""

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
    """A file that is uploaded in parts."""

    __tablename__ = "uploads"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key: Mapped[str] = mapped_column(String(32))
    filename: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(String(32))
    mime_type: Mapped[str] = mapped_column(String(256))
    bytes: Mapped[int] = mapped_column(BigInteger)
    file_seconds: Mapped[int | None] = mapped_column(BigInteger, default=None)
    """Lifetime of the completed file."""
    status: Mapped[str] = mapped_column(String(16))
    file: Mapped[str | None] = mapped_column(String(64), default=None)
    created_at: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[int] = mapped_column(BigInteger, index=True)


class Part(Table):
    """A part of an upload; its bytes are stored under its id."""

    __tablename__ = "parts"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    upload: Mapped[str] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"), index=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[int] = mapped_column(BigInteger)


class Creation(Table):
    """The object that a request created, so that its retry finds it."""

    __tablename__ = "creations"
    number: Mapped[int] = mapped_column(BIG, primary_key=True, autoincrement=True)
    project: Mapped[str] = mapped_column(String(64))
    key: Mapped[str] = mapped_column(String(32))
    route: Mapped[str] = mapped_column(String(64))
    idempotency_key: Mapped[str | None] = mapped_column(String(256), default=None)
    digest: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the request's content."""
    object: Mapped[str] = mapped_column(String(64))
    retried: Mapped[bool] = mapped_column(default=False)
    created: Mapped[float] = mapped_column(Float)
    __table_args__ = (
        UniqueConstraint("project", "route", "idempotency_key", name="creations_idempotency"),
        Index("creations_digest", "project", "key", "route", "digest"),
        Index("creations_created", "created"),
    )


class Usage(Table):
    """A key's usage, in addition to the answers in `answers`."""

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
    """An entry of the audit log."""

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
    """A receiver of events."""

    __tablename__ = "webhook_endpoints"
    project: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str] = mapped_column(Text)
    url: Mapped[str] = mapped_column(Text)
    event_types: Mapped[list[str]] = mapped_column(JSON)
    secret: Mapped[str] = mapped_column(Text)
    """Encrypted, as is the previous one."""
    old_secret: Mapped[str | None] = mapped_column(Text, default=None)
    old_until: Mapped[int | None] = mapped_column(BigInteger, default=None)
    hint: Mapped[str] = mapped_column(String(16))
    updated_at: Mapped[int] = mapped_column(BigInteger)
    deleted_at: Mapped[int | None] = mapped_column(BigInteger, default=None)


class Delivery(Table):
    """An event to be delivered to an endpoint."""

    __tablename__ = "deliveries"
    number: Mapped[int] = mapped_column(BIG, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64))
    """The id of the event."""
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
    """Requests in a file that are answered in the background."""

    __tablename__ = "batches"
    project: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key: Mapped[str] = mapped_column(String(32))
    endpoint: Mapped[str] = mapped_column(String(64))
    input_file: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16), index=True)
    details: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    """Metadata, counts, times and files, in the form of the API."""
    output_seconds: Mapped[int | None] = mapped_column(BigInteger, default=None)
    lease_until: Mapped[float] = mapped_column(Float, default=0.0)
    """Until then the batch belongs to the server that processes it."""
    __table_args__ = (Index("batches_page", "project", "created_at", "number"),)


class Secret(Table):
    """A project's secret, encrypted with the server's own key."""

    __tablename__ = "secrets"
    project: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    """`wandb`."""
    value: Mapped[str] = mapped_column(Text)
    created_at: Mapped[int] = mapped_column(BigInteger)
