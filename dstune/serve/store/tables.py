"""The database's tables. A change here needs a file in `migrations/versions`; a test compares the two."""

from __future__ import annotations

import datetime

from sqlalchemy import JSON, BigInteger, DateTime, Float, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

DEFAULT_ORGANIZATION, DEFAULT_PROJECT = "org-default", "proj_default"
"""For keys that name no other project; created by a migration."""


class Table(DeclarativeBase):
    pass


class Organization(Table):
    """The owner of projects, models and usage."""

    __tablename__ = "organizations"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), unique=True)
    created_at: Mapped[int] = mapped_column(BigInteger)


class Project(Table):
    """Shared by keys: files, jobs and their results. Nothing of it is visible to other projects."""

    __tablename__ = "projects"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    organization: Mapped[str] = mapped_column(ForeignKey("organizations.id"), index=True)
    name: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[int] = mapped_column(BigInteger)
    __table_args__ = (UniqueConstraint("organization", "name", name="projects_name"),)


class Key(Table):
    """A client's key. Only its SHA-256 is stored: the key has 256 random bits, so it cannot be guessed."""

    __tablename__ = "keys"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), unique=True)
    hash: Mapped[str] = mapped_column(String(64))
    admin: Mapped[bool] = mapped_column(default=False)
    project: Mapped[str] = mapped_column(String(64), default=DEFAULT_PROJECT, server_default=DEFAULT_PROJECT)
    role: Mapped[str] = mapped_column(String(16), default="member", server_default="member")
    """`owner`, `member` or `read_only`."""
    models: Mapped[list[str] | None] = mapped_column(JSON, default=None)
    """Names of models that it may use; None for all."""
    requests_per_minute: Mapped[int | None] = mapped_column(Integer, default=None)
    tokens_per_day: Mapped[int | None] = mapped_column(Integer, default=None)
    concurrent: Mapped[int | None] = mapped_column(Integer, default=None)
    created: Mapped[datetime.datetime] = mapped_column(DateTime(timezone=True))
    revoked: Mapped[datetime.datetime | None] = mapped_column(DateTime(timezone=True), default=None)


class AnswerRow(Table):
    """An answered request, without its text."""

    __tablename__ = "answers"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    """The id of the request."""
    response: Mapped[str | None] = mapped_column(String(128), index=True, default=None)
    """The id inside the answer itself."""
    key: Mapped[str] = mapped_column(ForeignKey("keys.id"), index=True)
    model: Mapped[str] = mapped_column(String(256))
    version: Mapped[str] = mapped_column(String(128))
    user: Mapped[str | None] = mapped_column(String(256), default=None, index=True)
    safety_identifier: Mapped[str | None] = mapped_column(String(256), default=None, index=True)
    """The other name of a user that a request may have; None if `user` is the same."""
    status: Mapped[int] = mapped_column(Integer)
    tokens: Mapped[int] = mapped_column(Integer, default=0)
    """Tokens of the prompt and the answer."""
    input_tokens: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    seconds: Mapped[float] = mapped_column(Float, default=0.0)
    created: Mapped[datetime.datetime] = mapped_column(DateTime(timezone=True), index=True)


class Feedback(Table):
    """Feedback on an answer from the key that received it: one row, which later feedback updates."""

    __tablename__ = "feedback"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    answer: Mapped[str] = mapped_column(ForeignKey("answers.id", ondelete="CASCADE"))
    key: Mapped[str] = mapped_column(ForeignKey("keys.id"))
    rating: Mapped[float | None] = mapped_column(Float, default=None)
    label: Mapped[str | None] = mapped_column(String(256), default=None)
    correction: Mapped[str | None] = mapped_column(Text, default=None)
    bytes: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    """Bytes of the label and the correction."""
    created: Mapped[datetime.datetime] = mapped_column(DateTime(timezone=True))
    __table_args__ = (Index("feedback_answer", "answer", unique=True), Index("feedback_key", "key"))
