"""The routes of batches."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from dstune.finetuning import audit, pages
from dstune.finetuning.creations import Attempt
from dstune.finetuning.fields import Body, IdText, Metadata, read_body, refuse_body
from dstune.finetuning.files import Files, lifetime
from dstune.finetuning.ids import new_id, unix_time
from dstune.finetuning.tables import Batch
from dstune.serve.errors import ApiError
from dstune.serve.gateway.app import Gateway
from dstune.serve.gateway.request import Request
from dstune.serve.gateway.routes import INFERENCE
from dstune.serve.store.database import Database
from dstune.serve.validation import Expected

ENDPOINTS = tuple(path for path in INFERENCE if path.startswith("/v1/"))
WINDOW_SECONDS = 86_400
MOST_OPEN = 500
"""Unfinished batches of a project."""
ENDED = ("completed", "failed", "expired", "cancelled")
TIMES = (
    "in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at",
    "cancelled_at",
)  # fmt: skip


class Creation(Body):
    """The body of a request that creates a batch."""

    endpoint: Annotated[Literal[ENDPOINTS], Expected(f"must be one of {', '.join(ENDPOINTS)}")]  # type: ignore[valid-type]
    completion_window: Annotated[Literal["24h"], Expected("must be '24h'")]
    input_file_id: Annotated[str, IdText(128)]
    metadata: Metadata | None = None
    output_expires_after: Any = None


class Batches:
    def __init__(self, database: Database, files: Files):
        self._database, self._files = database, files

    async def create(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        creation = read_body(Creation, await request.json())
        if not gateway.fleet.started.is_set():
            raise ApiError(503, "The models are being started.", code="starting", headers={"retry-after": "5"})
        if not gateway.fleet.models:
            raise ApiError(400, "This server serves no model.", param="endpoint", code="no_models")
        seconds = lifetime(creation.output_expires_after, "batch", "output_expires_after")
        attempt = Attempt.of(request, "batches", request.digest)
        row = await asyncio.to_thread(self._create, request, attempt, creation, seconds)
        await request.answer(describe_batch(row))

    async def listed(self, gateway: Gateway, request: Request) -> None:
        page = pages.page_of(request.query(("after", "limit")), limit=20, most=100)
        await request.answer(await asyncio.to_thread(self._list, request, page))

    async def retrieve(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        await request.answer(describe_batch(await asyncio.to_thread(self._read, request)))

    async def cancel(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        await refuse_body(request)
        await request.answer(describe_batch(await asyncio.to_thread(self._cancel, request)))

    def _create(self, request: Request, attempt: Attempt, creation: Creation, seconds: int | None) -> Batch:
        caller = request.key
        with self._database.writing.begin() as session:
            self._database.exclusive(session, f"creations {caller.project}")
            if earlier_id := attempt.earlier_object(session):
                return self._of(session, caller.project, earlier_id)
            file = self._files.of(session, caller.project, creation.input_file_id, "input_file_id")
            if file.purpose != "batch":
                message = f"The file has the purpose {file.purpose!r}; a batch needs 'batch'."
                raise ApiError(400, message, param="input_file_id", code="invalid_purpose")
            self._files.check_space(session, caller.project)  # its results are stored in any case
            open_ones = (Batch.project == caller.project, Batch.status.not_in(ENDED))
            if (session.scalar(select(func.count()).select_from(Batch).where(*open_ones)) or 0) >= MOST_OPEN:
                message = f"{MOST_OPEN} batches of this project are not over; create more when some have ended."
                headers = {"retry-after": "60", "x-should-retry": "false"}
                raise ApiError(429, message, code="rate_limit_exceeded", headers=headers)
            now = unix_time()
            details = {"metadata": creation.metadata, "expires_at": now + WINDOW_SECONDS}
            row = Batch(
                id=new_id("batch_"), created_at=now, project=caller.project, key=caller.id, endpoint=creation.endpoint,
                input_file=file.id, status="validating", details=details, output_seconds=seconds,
            )  # fmt: skip
            session.add(row)
            attempt.record(session, row.id)
            audit.note(session, request, "batch.created", row.id, file=file.id)
        return row

    @staticmethod
    def _of(session: Session, project: str, batch: str, *, lock: bool = False) -> Batch:
        query = select(Batch).where(Batch.project == project, Batch.id == batch)
        row = session.scalar(query.with_for_update() if lock else query)
        if row is None:
            raise ApiError(404, f"No such batch: {batch[:128]}", param="batch_id", code="batch_not_found")
        return row

    def _read(self, request: Request) -> Batch:
        with self._database.session() as session:
            return self._of(session, request.key.project, request.parameters["batch"])

    def _list(self, request: Request, page: pages.Page) -> dict[str, Any]:
        with self._database.session() as session:
            rows, has_more = pages.rows_of(session, Batch, page, [Batch.project == request.key.project])
        return pages.listing([describe_batch(row) for row in rows], has_more, nobody="")

    def _cancel(self, request: Request) -> Batch:
        with self._database.writing.begin() as session:
            row = self._of(session, request.key.project, request.parameters["batch"], lock=True)
            if row.status in ("cancelling", "cancelled"):
                return row
            if row.status in ENDED:
                raise ApiError(400, f"The batch is {row.status}.", code=f"batch_{row.status}")
            row.status, row.details = "cancelling", {**row.details, "cancelling_at": unix_time()}
            audit.note(session, request, "batch.cancelled", row.id)
        return row


def describe_batch(row: Batch) -> dict[str, Any]:
    details = row.details
    counts = {"total": 0, "completed": 0, "failed": 0} | details.get("request_counts", {})
    return {
        "id": row.id,
        "object": "batch",
        "endpoint": row.endpoint,
        "input_file_id": row.input_file,
        "completion_window": "24h",
        "status": row.status,
        "created_at": row.created_at,
        **{name: details.get(name) for name in TIMES},
        "errors": {"object": "list", "data": details["errors"]} if details.get("errors") else None,
        "output_file_id": details.get("output_file_id"),
        "error_file_id": details.get("error_file_id"),
        "request_counts": counts,
        "metadata": details.get("metadata"),
    }
