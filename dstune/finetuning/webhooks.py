"""`/v1/webhook_endpoints`: receivers of events about jobs and batches, signed in the form that the official client verifies."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import aiohttp
from pydantic import Field
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from dstune.core.errors import DstuneError
from dstune.finetuning import audit, pages
from dstune.finetuning.addresses import checked_url, is_allowed, outward_session
from dstune.finetuning.creations import Attempt, is_retry
from dstune.finetuning.fields import Body, IdText, read_body
from dstune.finetuning.ids import new_id, unix_time
from dstune.finetuning.settings import ApiSettings
from dstune.finetuning.tables import Delivery, WebhookEndpoint
from dstune.finetuning.vault import Vault
from dstune.serve.errors import ApiError
from dstune.serve.gateway.app import Gateway
from dstune.serve.gateway.request import Request
from dstune.serve.store.database import Database
from dstune.serve.validation import Expected, FailsFast, Flag

log = logging.getLogger("dstune.serve")

EVENT_TYPES = (
    "batch.completed", "batch.failed", "batch.expired", "batch.cancelled",
    "fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled",
)  # fmt: skip
MOST_ENDPOINTS = 20
"""Per project."""
MOST_TESTS = 4
"""Per project at a time."""
SECONDS = 10.0
"""Time limit for a receiver's answer."""
OLD_SECRET_SECONDS = 86_400


EventType = Annotated[Literal[EVENT_TYPES], Expected(f"must be one of {', '.join(EVENT_TYPES)}")]  # type: ignore[valid-type]
EventTypes = Annotated[list[EventType], Field(min_length=1), FailsFast]


class Change(Body):
    """The body of a request that changes an endpoint."""

    name: Annotated[str, IdText(256)] | None = None
    url: str | None = None
    event_types: EventTypes | None = None


class Creation(Change):
    name: Annotated[str, IdText(256)]
    url: str
    event_types: EventTypes


class Rotation(Body):
    keep_old_secret_active_for_24_hours: Flag = False


class Trial(Body):
    event_type: EventType


class Webhooks:
    def __init__(self, database: Database, vault: Vault, settings: ApiSettings):
        self._database, self._vault = database, vault
        self.allowed: Collection[str] = settings.webhook_hosts
        self._testing: Counter[str] = Counter()
        """Test events per project that have not been answered yet."""

    # -- routes

    async def create(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        values = self._checked(await request.json(), Creation)
        attempt = Attempt.of(request, "webhook_endpoints", request.digest)
        row, secret = await asyncio.to_thread(self._create, request, attempt, values)
        await request.answer(describe_endpoint(row) | {"signing_secret": secret})

    async def listed(self, gateway: Gateway, request: Request) -> None:
        page = pages.page_of(request.query(("after", "limit")), limit=20, most=100)
        await request.answer(await asyncio.to_thread(self._list, request, page))

    async def retrieve(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        await request.answer(describe_endpoint(await asyncio.to_thread(self._read, request)))

    async def update(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        values = self._checked(await request.json(), Change)
        await request.answer(describe_endpoint(await asyncio.to_thread(self._update, request, values)))

    async def delete(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        name = request.parameters["endpoint"]
        await asyncio.to_thread(self._delete, request)
        await request.answer({"id": name, "object": "webhook_endpoint.deleted", "deleted": True})

    async def rotate(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        has_body = request.header("content-length") not in ("", "0") or request.header("transfer-encoding")
        keep = read_body(Rotation, await request.json() if has_body else {}).keep_old_secret_active_for_24_hours
        attempt = Attempt.of(request, "webhook_rotations", f"{request.parameters['endpoint']} {keep}")
        row, secret = await asyncio.to_thread(self._rotate, request, attempt, keep)
        await request.answer(describe_endpoint(row) | {"signing_secret": secret})

    async def test(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        kind = read_body(Trial, await request.json()).event_type
        row = await asyncio.to_thread(self._read, request)
        event = event_body(kind, "test_" + new_id("", 16))
        if self._testing[row.project] >= MOST_TESTS:
            message = f"{MOST_TESTS} events of this project are being tried already."
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": "10"})
        self._testing[row.project] += 1
        try:
            status = await self.send(row, json.loads(event)["id"], event)
        finally:
            self._testing[row.project] -= 1
        if status is None:
            raise ApiError(400, "The endpoint could not be reached.", code="webhook_unreachable")
        await request.answer(
            {
                "object": "webhook_endpoint.test", "webhook_endpoint_id": row.id, "event_type": kind, "status_code": status,
                "success": True,
            }
        )  # fmt: skip

    async def event_types(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        await request.answer({"object": "list", "data": list(EVENT_TYPES)})

    # -- for jobs and batches

    def enqueue(self, session: Session, project: str, kind: str, subject: str) -> None:
        """Queue an event for delivery, inside the transaction that makes it true. subject: the id of a job or batch."""
        assert kind in EVENT_TYPES
        endpoints = select(WebhookEndpoint).where(
            WebhookEndpoint.project == project, WebhookEndpoint.deleted_at.is_(None)
        )
        for endpoint in session.scalars(endpoints):
            if kind in endpoint.event_types:
                body = event_body(kind, subject)
                session.add(
                    Delivery(id=json.loads(body)["id"], endpoint=endpoint.id, body=body, next_at=time.time(), state="waiting")
                )  # fmt: skip

    async def send(self, row: WebhookEndpoint, event: str, body: str) -> int | None:
        """Send an event and return the receiver's status; None if it cannot be reached, or its address is not allowed."""
        timestamp = str(unix_time())
        sealed = [row.secret]
        if row.old_secret is not None and (row.old_until or 0) > unix_time():
            sealed.append(row.old_secret)
        try:
            signatures = [sign(self._vault.open(secret), event, timestamp, body) for secret in sealed]
        except DstuneError as error:
            log.error("an event of %s cannot be signed: %s", row.id, error)
            return None
        headers = {
            "content-type": "application/json",
            "user-agent": "dstune-webhooks",
            "webhook-id": event,
            "webhook-timestamp": timestamp,
            "webhook-signature": " ".join(signatures),
        }
        try:
            url = checked_url(row.url, self.allowed)
            is_own_address = is_allowed(urlsplit(url), self.allowed)
            async with (
                outward_session(allowed=is_own_address, seconds=SECONDS) as client,
                client.post(url, data=body.encode(), headers=headers, allow_redirects=False) as answer,
            ):
                return answer.status
        except (aiohttp.ClientError, OSError, TimeoutError, ApiError, ValueError):
            return None

    # -- inside

    def _checked(self, body: Mapping[str, Any], kind: type[Change]) -> dict[str, Any]:
        values = read_body(kind, body).model_dump(exclude_none=True)
        if "url" in values:
            checked_url(values["url"], self.allowed)
        if "event_types" in values:
            values["event_types"] = sorted(set(values["event_types"]))
        return values

    def _create(self, request: Request, attempt: Attempt, values: dict[str, Any]) -> tuple[WebhookEndpoint, str]:
        secret, now = new_secret(), unix_time()
        with self._database.writing.begin() as session:
            self._database.exclusive(session, f"creations {request.key.project}")
            if earlier_id := attempt.earlier_object(session):
                row = self._find(session, request.key.project, earlier_id)
                return row, self._vault.open(row.secret)
            of_project = (WebhookEndpoint.project == request.key.project, WebhookEndpoint.deleted_at.is_(None))
            if (
                session.scalar(select(func.count()).select_from(WebhookEndpoint).where(*of_project)) or 0
            ) >= MOST_ENDPOINTS:
                raise ApiError(400, f"A project has at most {MOST_ENDPOINTS} webhook endpoints.", code="too_many")
            row = WebhookEndpoint(
                id=new_id("we_"), created_at=now, updated_at=now, project=request.key.project,
                secret=self._vault.seal(secret), hint=f"whsec_…{secret[-4:]}", **values,
            )  # fmt: skip
            session.add(row)
            attempt.record(session, row.id)
            audit.note(session, request, "webhook.created", row.id, url=values["url"])
        return row, secret

    def _endpoint_of(self, session: Session, request: Request, *, deleted: bool = False) -> WebhookEndpoint:
        return self._find(session, request.key.project, request.parameters["endpoint"], deleted=deleted)

    @staticmethod
    def _find(session: Session, project: str, name: str, *, deleted: bool = False) -> WebhookEndpoint:
        """Return an endpoint of a project. deleted: whether it may be a deleted one. Raises ApiError if there is none."""
        query = select(WebhookEndpoint).where(WebhookEndpoint.project == project, WebhookEndpoint.id == name)
        row = session.scalar(query)
        if row is None or (row.deleted_at is not None and not deleted):
            raise ApiError(404, f"No such webhook endpoint: {name[:128]}", param="id", code="webhook_not_found")
        return row

    def _read(self, request: Request) -> WebhookEndpoint:
        with self._database.session() as session:
            return self._endpoint_of(session, request)

    def _list(self, request: Request, page: pages.Page) -> dict[str, Any]:
        with self._database.session() as session:
            of_project = [WebhookEndpoint.project == request.key.project]
            rows, has_more = pages.rows_of(
                session, WebhookEndpoint, page, of_project, WebhookEndpoint.deleted_at.is_(None)
            )
        return pages.listing([describe_endpoint(row) for row in rows], has_more)

    def _update(self, request: Request, values: dict[str, Any]) -> WebhookEndpoint:
        with self._database.writing.begin() as session:
            row = self._endpoint_of(session, request)
            if changed := {name: value for name, value in values.items() if getattr(row, name) != value}:
                for name, value in changed.items():
                    setattr(row, name, value)
                row.updated_at = unix_time()
                audit.note(session, request, "webhook.updated", row.id, **changed)
        return row

    def _rotate(self, request: Request, attempt: Attempt, keep: bool) -> tuple[WebhookEndpoint, str]:
        secret = new_secret()
        with self._database.writing.begin() as session:
            self._database.exclusive(session, f"creations {attempt.project}")
            row = self._endpoint_of(session, request)
            if attempt.earlier_object(session):  # rotated once more, the secret that receivers know would be gone
                return row, self._vault.open(row.secret)
            attempt.record(session, row.id)
            row.old_secret, row.old_until = (row.secret, unix_time() + OLD_SECRET_SECONDS) if keep else (None, None)
            row.secret, row.hint, row.updated_at = self._vault.seal(secret), f"whsec_…{secret[-4:]}", unix_time()
            audit.note(session, request, "webhook.rotated", row.id)
        return row, secret

    def _delete(self, request: Request) -> None:
        with self._database.writing.begin() as session:
            row = self._endpoint_of(session, request, deleted=is_retry(request.header("x-stainless-retry-count")))
            if row.deleted_at is None:
                row.deleted_at, row.url, row.old_secret = unix_time(), "", None
                audit.note(session, request, "webhook.deleted", row.id)


def new_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def sign(secret: str, event: str, timestamp: str, body: str) -> str:
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.new(key, f"{event}.{timestamp}.{body}".encode(), hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


def event_body(kind: str, subject: str) -> str:
    event = {"id": new_id("evt_"), "object": "event", "created_at": unix_time(), "type": kind, "data": {"id": subject}}
    return json.dumps(event)


def describe_endpoint(row: WebhookEndpoint) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "webhook_endpoint",
        "created_at": row.created_at,
        "updated_at": row.updated_at,
        "name": row.name,
        "url": row.url,
        "event_types": row.event_types,
        "signing_secret_hint": row.hint,
    }
