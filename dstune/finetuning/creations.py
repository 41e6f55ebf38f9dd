"""Makes retries of a creating request idempotent.

The official client retries a POST that got no answer, and sends no `Idempotency-Key` with it. Two requests are the same if they
have the same `Idempotency-Key`. They are also the same if they have the same API key and content, `x-stainless-retry-count` marks
the second as a retry, and it comes within three times the client's timeout.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from dstune.finetuning.tables import Creation
from dstune.serve.errors import ApiError
from dstune.serve.gateway.request import Request

RETENTION_SECONDS = 86_400
"""Creations are forgotten after this time."""
READ_TIMEOUT = 600.0
"""The default timeout, in seconds, of clients that do not state theirs."""


@dataclass(frozen=True)
class Attempt:
    """One request that creates an object."""

    project: str
    key: str
    route: str
    digest: str
    idempotency_key: str | None
    repeated: bool
    window: float
    """Seconds within which a first attempt counts as the same request."""
    began: float

    @classmethod
    def of(cls, request: Request, route: str, digest: str) -> Attempt:
        """Read the headers of an attempt. digest: SHA-256 of the request's content. Raises ApiError for invalid headers."""
        key = request.header("idempotency-key")
        if key and not (len(key) <= 255 and key.isprintable() and key.isascii()):
            raise ApiError(400, "Idempotency-Key must be 1 to 255 printable characters.", param="Idempotency-Key")
        count = request.header("x-stainless-retry-count")
        return cls(
            request.key.project,
            request.key.id,
            route,
            digest,
            key or None,
            repeated=is_retry(count),
            window=3 * _timeout(request.header("x-stainless-read-timeout")),
            began=time.time() - (time.monotonic() - request.began),
        )

    def earlier_object(self, session: Session) -> str | None:
        """Return the id of the object that an earlier attempt created; call it inside the transaction that would create the object.
        Raises ApiError if the same Idempotency-Key was used with different content."""
        if self.idempotency_key is not None:
            has_this_key = Creation.idempotency_key == self.idempotency_key
            row = session.scalar(
                select(Creation).where(Creation.project == self.project, Creation.route == self.route, has_this_key)
            )
            if row is None:
                return None
            if row.digest != self.digest:
                message = "This Idempotency-Key was used for a request with another content."
                raise ApiError(400, message, param="Idempotency-Key", code="idempotency_key_reused")
            return row.object
        # A retry finds the first attempt, and a slow first attempt finds its retry.
        late = Creation.retried.is_(True) & (Creation.created >= self.began)
        recent = Creation.created >= time.time() - self.window
        query = (
            select(Creation.object)
            .where(
                Creation.project == self.project,
                Creation.key == self.key,
                Creation.route == self.route,
                Creation.digest == self.digest,
                or_(recent, late) if self.repeated else late,
            )
            .order_by(Creation.number.desc())
        )
        return session.scalars(query).first()

    def record(self, session: Session, object_id: str) -> None:
        session.add(
            Creation(
                project=self.project, key=self.key, route=self.route, idempotency_key=self.idempotency_key,
                digest=self.digest, object=object_id, retried=self.repeated, created=time.time(),
            )
        )  # fmt: skip


def is_retry(count: str) -> bool:
    return count.isascii() and count.isdigit() and count.strip("0") != ""


def forget(session: Session) -> None:
    session.execute(delete(Creation).where(Creation.created < time.time() - RETENTION_SECONDS))


def _timeout(text: str) -> float:
    try:
        return min(max(float(text), 1.0), 3600.0)
    except ValueError:
        return READ_TIMEOUT
