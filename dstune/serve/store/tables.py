"""The tables. A change here needs a file in `migrations/versions`; a test holds both against each other."""

from __future__ import annotations

import datetime

from sqlalchemy import JSON, DateTime, Float, ForeignKey, Index, Integer, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Table(DeclarativeBase):
    pass


class Key(Table):
    """Who may ask. The key itself is not kept, only its SHA-256: it has 256 random bits, so it cannot be guessed."""

    __tablename__ = "keys"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), unique=True)
    hash: Mapped[str] = mapped_column(String(64))
    admin: Mapped[bool] = mapped_column(default=False)
    models: Mapped[list[str] | None] = mapped_column(JSON, default=None)
    """Names that it may use; None for all."""
    requests_per_minute: Mapped[int | None] = mapped_column(Integer, default=None)
    tokens_per_day: Mapped[int | None] = mapped_column(Integer, default=None)
    concurrent: Mapped[int | None] = mapped_column(Integer, default=None)
    created: Mapped[datetime.datetime] = mapped_column(DateTime(timezone=True))
    revoked: Mapped[datetime.datetime | None] = mapped_column(DateTime(timezone=True), default=None)


class AnswerRow(Table):
    """An answer that was given, without its text."""

    __tablename__ = "answers"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    """The request's id."""
    response: Mapped[str | None] = mapped_column(String(128), index=True, default=None)
    """The id in the answer itself."""
    key: Mapped[str] = mapped_column(ForeignKey("keys.id"), index=True)
    model: Mapped[str] = mapped_column(String(128))
    version: Mapped[str] = mapped_column(String(128))
    user: Mapped[str | None] = mapped_column(String(256), default=None, index=True)
    status: Mapped[int] = mapped_column(Integer)
    tokens: Mapped[int] = mapped_column(Integer, default=0)
    seconds: Mapped[float] = mapped_column(Float, default=0.0)
    created: Mapped[datetime.datetime] = mapped_column(DateTime(timezone=True), index=True)


class Feedback(Table):
    """What somebody said of an answer."""

    __tablename__ = "feedback"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    answer: Mapped[str] = mapped_column(ForeignKey("answers.id", ondelete="CASCADE"))
    key: Mapped[str] = mapped_column(ForeignKey("keys.id"))
    rating: Mapped[float | None] = mapped_column(Float, default=None)
    label: Mapped[str | None] = mapped_column(String(256), default=None)
    correction: Mapped[str | None] = mapped_column(Text, default=None)
    created: Mapped[datetime.datetime] = mapped_column(DateTime(timezone=True))
    __table_args__ = (Index("feedback_answer", "answer"),)
