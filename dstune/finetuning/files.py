"""`/v1/files`: equal contents of a project are stored once, under several file ids, and removed when no id references them."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from dstune.finetuning import audit, pages
from dstune.finetuning.blobs import Blobs, Staged
from dstune.finetuning.creations import Attempt, is_retry
from dstune.finetuning.fields import refuse_unknown
from dstune.finetuning.forms import read_form
from dstune.finetuning.ids import new_id, unix_time
from dstune.finetuning.settings import ApiSettings
from dstune.finetuning.tables import Blob, File
from dstune.serve.errors import ApiError
from dstune.serve.gateway.app import Gateway
from dstune.serve.gateway.request import Request
from dstune.serve.store.database import Database
from dstune.serve.store.keys import Caller

PURPOSES = ("fine-tune", "evals", "user_data", "batch")
BATCH_SECONDS = 30 * 86_400
"""Default lifetime of a batch's input file."""


class Files:
    def __init__(self, database: Database, blobs: Blobs, settings: ApiSettings):
        self._database, self._blobs, self._settings = database, blobs, settings
        self.counted: list[Callable[[Session, str], int]] = [self._bytes_of]
        """Return the bytes that a project uses; one function for each kind of storage."""

    # -- routes

    async def create(self, gateway: Gateway, request: Request) -> None:
        request.repeatable = False  # an older client would send an empty file on its retry
        request.query(())
        names = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
        form = await read_form(request, self._blobs, file="file", fields=names, most=self._settings.file_bytes)
        try:
            purpose = checked_purpose(form.fields.get("purpose"))
            seconds = lifetime(_expiry(form.fields), purpose)
            described = [form.filename, purpose, seconds, form.file.sha256]
            attempt = Attempt.of(request, "files", hashlib.sha256(json.dumps(described).encode()).hexdigest())
            made = await asyncio.to_thread(self._create, request, attempt, form.file, form.filename, purpose, seconds)
        finally:
            form.file.discard()
        await request.answer(describe_file(made))

    async def listed(self, gateway: Gateway, request: Request) -> None:
        query = request.query((*pages.PARAMETERS, "purpose"))
        page = pages.page_of(query, limit=10_000, most=10_000)
        purpose = query.get("purpose")
        body = await asyncio.to_thread(self._list, request.key, page, purpose)
        await request.answer(body)

    async def retrieve(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        await request.answer(describe_file(await asyncio.to_thread(self._read, request)))

    async def content(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        row = await asyncio.to_thread(self._read, request)
        assert row.blob is not None
        pieces = self._blobs.read(row.blob)
        try:
            piece = await asyncio.to_thread(next, pieces, b"")
        except FileNotFoundError:
            raise missing(row.id) from None  # it has just been deleted
        headers = [
            (b"content-type", b"application/octet-stream"),
            (b"content-disposition", b"attachment"),
            (b"content-length", str(row.bytes).encode()),
        ]
        await request.send({"type": "http.response.start", "status": 200, "headers": headers})
        while piece:
            await request.send({"type": "http.response.body", "body": piece, "more_body": True})
            piece = await asyncio.to_thread(next, pieces, b"")
        await request.send({"type": "http.response.body", "body": b""})

    async def delete(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        file = request.parameters["file"]
        await asyncio.to_thread(self._delete, request, file)
        await request.answer({"id": file, "object": "file", "deleted": True})

    # -- for jobs and batches

    def of(self, session: Session, project: str, file: str, param: str = "id") -> File:
        """Return a file of a project. Raises ApiError 404 if it does not exist or has expired."""
        row = session.scalar(select(File).where(File.project == project, File.id == file, *_alive_conditions()))
        if row is None:
            raise missing(file, param)
        return row

    def snapshot(self, row: File, target: Path) -> None:
        """Copy the bytes of a file to a path that stays when the file is deleted."""
        assert row.blob is not None
        self._blobs.snapshot(row.blob, target)

    def stage(self) -> Staged:
        """Return a file for the server itself to write; `close` it, then `add` it, then `discard` it."""
        return self._blobs.stage()

    def add(
        self, session: Session, staged: Staged, *, project: str, key: str, filename: str, purpose: str,
        seconds: int | None = None, is_server_made: bool = False,
    ) -> File:  # fmt: skip
        """Add a file from staged and closed bytes, inside a writing transaction. is_server_made: add it even if the project has no
        space left, since its job or batch could not end otherwise. Raises ApiError if the project has too little space."""
        self._database.exclusive(session, f"blobs {project}")
        blob = session.scalar(select(Blob).where(Blob.project == project, Blob.sha256 == staged.sha256))
        if blob is None:
            if not is_server_made:
                self.check_space(session, project, staged.size)
            blob = Blob(
                id=staged.id, project=project, sha256=staged.sha256, bytes=staged.size, references=0,
                created_at=unix_time(),
            )  # fmt: skip
            session.add(blob)
            session.flush()
            self._blobs.keep(staged)
        blob.references += 1
        now = unix_time()
        row = File(
            id=new_id("file-"), created_at=now, project=project, key=key, blob=blob.id, filename=filename,
            purpose=purpose, bytes=staged.size, expires_at=None if seconds is None else now + seconds,
        )  # fmt: skip
        session.add(row)
        return row

    def check_space(self, session: Session, project: str, size: int = 0) -> None:
        """Raise ApiError if the project has no space for `size` more bytes."""
        self._database.exclusive(session, f"blobs {project}")
        if self._used(session, project) + size > self._settings.project_bytes:
            message = (
                f"The files and jobs of this project would have more than {self._settings.project_bytes} bytes: "
                "delete files or models, or cancel jobs."
            )
            headers = {"retry-after": "60", "x-should-retry": "false"}
            raise ApiError(429, message, code="insufficient_quota", headers=headers)

    def has_space(self, project: str) -> bool:
        """Return whether the project has space left."""
        with self._database.session() as session:
            return self._used(session, project) <= self._settings.project_bytes

    def _used(self, session: Session, project: str) -> int:
        return sum(count(session, project) for count in self.counted)

    @staticmethod
    def _bytes_of(session: Session, project: str) -> int:
        return session.scalar(select(func.coalesce(func.sum(Blob.bytes), 0)).where(Blob.project == project)) or 0

    def sweep(self) -> None:
        """Delete expired files, and bytes that no row references."""
        unused: list[str] = []
        with self._database.writing.begin() as session:
            query = select(File).where(File.deleted_at.is_(None), File.expires_at <= unix_time()).limit(1000)
            for row in session.scalars(query.order_by(File.project).with_for_update(skip_locked=True)):
                unused += self._drop(session, row)
        self._remove(unused)

    def stored_blobs(self) -> list[str]:
        """Return the ids of all blobs that belong to files."""
        with self._database.session() as session:
            return list(session.scalars(select(Blob.id)))

    # -- inside

    def _create(
        self, request: Request, attempt: Attempt, staged: Staged, filename: str, purpose: str, seconds: int | None
    ) -> File:
        caller = request.key
        with self._database.writing.begin() as session:
            self._database.exclusive(session, f"creations {caller.project}")
            earlier_id = attempt.earlier_object(session)
            if earlier_id is not None:
                return self.of(session, caller.project, earlier_id)
            row = self.add(
                session, staged, project=caller.project, key=caller.id, filename=filename, purpose=purpose, seconds=seconds
            )  # fmt: skip
            attempt.record(session, row.id)
            audit.note(session, request, "file.created", row.id, bytes=row.bytes, purpose=purpose)
        return row

    def _list(self, caller: Caller, page: pages.Page, purpose: str | None) -> dict[str, Any]:
        listed = _alive_conditions() if purpose is None else [*_alive_conditions(), File.purpose == purpose]
        with self._database.session() as session:
            rows, has_more = pages.rows_of(session, File, page, [File.project == caller.project], *listed)
        return pages.listing([describe_file(row) for row in rows], has_more, nobody="")

    def _read(self, request: Request) -> File:
        with self._database.session() as session:
            return self.of(session, request.key.project, request.parameters["file"])

    def _delete(self, request: Request, file: str) -> None:
        project = request.key.project
        with self._database.writing.begin() as session:
            row = session.scalar(select(File).where(File.project == project, File.id == file).with_for_update())
            if row is None or (row.deleted_at and not is_retry(request.header("x-stainless-retry-count"))):
                raise missing(file)
            unused = [] if row.deleted_at else self._drop(session, row)
            audit.note(session, request, "file.deleted", file)
        self._remove(unused)

    def _drop(self, session: Session, row: File) -> list[str]:
        """Mark a file as deleted. Returns the blobs that no file references any more."""
        self._database.exclusive(session, f"blobs {row.project}")
        blob = session.get(Blob, row.blob) if row.blob is not None else None
        row.blob, row.filename, row.deleted_at = None, "", unix_time()
        session.flush()
        if blob is None:
            return []
        blob.references -= 1
        if blob.references > 0:
            return []
        session.delete(blob)
        return [blob.id]

    def _remove(self, blobs: Iterable[str]) -> None:
        for blob in blobs:
            self._blobs.remove(blob)


def describe_file(row: File) -> dict[str, Any]:
    """Describe a file, without fields that have no value: the API defines none that are null."""
    value = {
        "id": row.id,
        "object": "file",
        "bytes": row.bytes,
        "created_at": row.created_at,
        "expires_at": row.expires_at,
        "filename": row.filename,
        "purpose": row.purpose,
        "status": "processed",
    }
    return {name: field_value for name, field_value in value.items() if field_value is not None}


def missing(file: str, param: str = "id") -> ApiError:
    return ApiError(404, f"No such File object: {file[:128]}", param=param, code="file_not_found")


def checked_purpose(purpose: object) -> str:
    """Return the purpose of an upload if it is valid. Raises ApiError."""
    if purpose is None:
        raise ApiError(400, "Missing required field: 'purpose'.", param="purpose", code="missing_required_parameter")
    if purpose not in PURPOSES:
        excerpt = purpose[:80] if isinstance(purpose, str) else "it"
        message = f"Invalid purpose: {excerpt!r} is not one of {', '.join(PURPOSES)}."
        raise ApiError(400, message, param="purpose", code="invalid_purpose")
    return str(purpose)


def lifetime(expiry: Mapping[str, Any] | None, purpose: str, param: str = "expires_after") -> int | None:
    """Return a file's lifetime in seconds; None for ever. expiry: from a request, where the field is called `param`. Raises
    ApiError."""
    if expiry is None:
        return BATCH_SECONDS if purpose == "batch" else None
    if not isinstance(expiry, Mapping) or expiry.get("anchor") != "created_at":
        raise ApiError(400, f"Invalid {param}.anchor: must be 'created_at'.", param=f"{param}.anchor")
    refuse_unknown(expiry, ("anchor", "seconds"), param)
    seconds = expiry.get("seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, int) or not 3600 <= seconds <= 2_592_000:
        message = f"Invalid {param}.seconds: must be a whole number from 3600 to 2592000."
        raise ApiError(400, message, param=f"{param}.seconds")
    return seconds


def _expiry(fields: Mapping[str, str]) -> dict[str, Any] | None:
    """Return `expires_after` from the fields of a form."""
    expiry: dict[str, Any] = {
        part: fields[f"expires_after[{part}]"] for part in ("anchor", "seconds") if f"expires_after[{part}]" in fields
    }
    seconds = expiry.get("seconds", "")
    if seconds.isascii() and seconds.isdigit() and len(seconds) < 10:
        expiry["seconds"] = int(seconds)
    return expiry or None


def _alive_conditions() -> list[Any]:
    return [File.deleted_at.is_(None), or_(File.expires_at.is_(None), File.expires_at > unix_time())]
