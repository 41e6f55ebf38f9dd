"""`/v1/uploads`: a file that is uploaded in parts, in any order; the list at completion determines which parts count."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from dstune.finetuning import audit
from dstune.finetuning.blobs import Blobs, Staged
from dstune.finetuning.creations import Attempt
from dstune.finetuning.fields import Body, IdText, read_body, refuse_body
from dstune.finetuning.files import Files, checked_purpose, describe_file, lifetime
from dstune.finetuning.forms import read_form
from dstune.finetuning.ids import new_id, unix_time
from dstune.finetuning.settings import ApiSettings
from dstune.finetuning.tables import File, Part, Upload
from dstune.finetuning.turns import Turns
from dstune.serve.errors import ApiError
from dstune.serve.gateway.app import Gateway
from dstune.serve.gateway.request import Request
from dstune.serve.store.database import Database
from dstune.serve.validation import Expected, FailsFast, wrong

LIFETIME_SECONDS = 3600
MOST_PARTS = 10_000
MOST_PENDING = 100
"""Pending uploads of a project."""


def _check_printable(value: str) -> str:
    if not value.isprintable():
        raise wrong("must be printable")
    return value


class Creation(Body):
    """The body of a request that creates an upload."""

    filename: Annotated[str, IdText(512)]
    purpose: Any = None
    bytes: Annotated[int, Field(ge=1), Expected("must be a whole number above 0")]
    mime_type: Annotated[str, IdText(256), AfterValidator(_check_printable)]
    expires_after: Any = None


class Completion(Body):
    part_ids: Annotated[list[str], Field(min_length=1), FailsFast]
    md5: str | None = None


class Uploads:
    def __init__(self, database: Database, blobs: Blobs, files: Files, settings: ApiSettings):
        self._database, self._blobs, self._files, self._settings = database, blobs, files, settings
        files.counted.append(self._bytes_of)
        # Assembling gigabytes takes a while, so it uses threads of its own.
        self._completing = Turns(4, "complete-upload")

    # -- routes

    async def create(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        request.repeatable = False
        body = read_body(Creation, await request.json())
        purpose = checked_purpose(body.purpose)
        if body.bytes > self._settings.upload_bytes:
            message = f"Invalid bytes: must be a whole number from 1 to {self._settings.upload_bytes}."
            raise ApiError(400, message, param="bytes", code="invalid_value")
        seconds = lifetime(body.expires_after, purpose)
        attempt = Attempt.of(request, "uploads", request.digest)
        row = await asyncio.to_thread(
            self._create, request, attempt, body.filename, purpose, body.bytes, body.mime_type, seconds
        )
        await request.answer(describe_upload(row))

    async def add_part(self, gateway: Gateway, request: Request) -> None:
        request.repeatable = False
        request.query(())
        await asyncio.to_thread(self._open, request)  # before its body is read
        form = await read_form(
            request, self._blobs, file="data", fields=(), most=self._settings.part_bytes, prefix="part_"
        )
        try:
            part = await asyncio.to_thread(self._add_part, request, form.file)
        finally:
            form.file.discard()
        await request.answer(
            {"id": part.id, "object": "upload.part", "created_at": part.created_at, "upload_id": part.upload}
        )

    async def complete(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        request.repeatable = False
        body = read_body(Completion, await request.json())
        if len(set(body.part_ids)) != len(body.part_ids):
            raise ApiError(400, "Invalid part_ids: a part is named twice.", param="part_ids")
        upload, file = await self._completing.run(request.key.project, self._complete, request, body.part_ids, body.md5)
        await request.answer(describe_upload(upload, file))

    async def cancel(self, gateway: Gateway, request: Request) -> None:
        request.query(())
        await refuse_body(request)
        await request.answer(describe_upload(await asyncio.to_thread(self._cancel, request)))

    # -- inside

    def _create(
        self, request: Request, attempt: Attempt, filename: str, purpose: str, size: int, kind: str, seconds: int | None
    ) -> Upload:
        caller = request.key
        with self._database.writing.begin() as session:
            self._database.exclusive(session, f"creations {caller.project}")
            earlier_id = attempt.earlier_object(session)
            if earlier_id is not None:
                return self._find_upload(session, caller.project, earlier_id)
            pending = select(func.count()).select_from(Upload)
            pending = pending.where(Upload.project == caller.project, Upload.status == "pending")
            if (session.scalar(pending) or 0) >= MOST_PENDING:
                message = f"The project has {MOST_PENDING} uploads that are not completed: complete or cancel one."
                raise ApiError(429, message, code="rate_limit_exceeded", headers={"x-should-retry": "false"})
            now = unix_time()
            row = Upload(
                id=new_id("upload_"), project=caller.project, key=caller.id, filename=filename, purpose=purpose,
                mime_type=kind, bytes=size, file_seconds=seconds, status="pending", created_at=now,
                expires_at=now + LIFETIME_SECONDS,
            )  # fmt: skip
            session.add(row)
            attempt.record(session, row.id)
            audit.note(session, request, "upload.created", row.id, bytes=size, purpose=purpose)
        return row

    def _find_upload(self, session: Session, project: str, upload: str) -> Upload:
        """Return the project's upload with this id. Raises ApiError if there is none."""
        row = session.scalar(select(Upload).where(Upload.project == project, Upload.id == upload))
        if row is None:
            raise ApiError(404, f"No such Upload object: {upload[:128]}", param="upload_id", code="upload_not_found")
        if row.status == "pending" and row.expires_at <= unix_time():
            row.status = "expired"
        return row

    def _open(self, request: Request, session: Session | None = None) -> Upload:
        """Return the upload of a request. Raises ApiError if it accepts no more parts."""
        if session is None:
            with self._database.session() as new_session:
                return self._open(request, new_session)
        row = self._find_upload(session, request.key.project, request.parameters["upload"])
        if row.status != "pending":
            raise ApiError(400, f"The upload is {row.status}.", code=f"upload_{row.status}")
        return row

    def _add_part(self, request: Request, staged: Staged) -> Part:
        with self._database.writing.begin() as session:
            self._database.exclusive(session, f"upload {request.parameters['upload']}")
            upload = self._open(request, session)
            total = select(func.coalesce(func.sum(Part.bytes), 0), func.count()).where(Part.upload == upload.id)
            size, count = session.execute(total).one()
            # A part may be sent twice, and is then stored twice until the list at completion names one.
            if count >= MOST_PARTS or size + staged.size > 2 * upload.bytes + self._settings.part_bytes:
                raise ApiError(400, "The parts have more bytes than the upload.", param="data", code="upload_too_large")
            self._files.check_space(session, upload.project, staged.size)
            part = Part(id=staged.id, upload=upload.id, bytes=staged.size, created_at=unix_time())
            session.add(part)
            session.flush()
            self._blobs.keep(staged)
        return part

    def _complete(self, request: Request, ids: Sequence[str], md5: str | None) -> tuple[Upload, File]:
        project, name = request.key.project, request.parameters["upload"]
        with self._database.session() as session:
            upload = self._find_upload(session, project, name)
            parts = {part.id: part for part in session.scalars(select(Part).where(Part.upload == upload.id))}
        if upload.status == "completed":
            return self._completed(upload)
        if upload.status != "pending":
            raise ApiError(400, f"The upload is {upload.status}.", code=f"upload_{upload.status}")
        for index, part_id in enumerate(ids):
            if part_id not in parts:
                at = f"part_ids[{index}]"
                raise ApiError(400, f"No such part of this upload: {part_id[:128]}", param=at, code="part_not_found")
        total = sum(parts[part_id].bytes for part_id in ids)
        if total != upload.bytes:
            message = f"The parts have {total} bytes together; the upload was announced with {upload.bytes}."
            raise ApiError(400, message, param="part_ids", code="upload_size_mismatch")
        staged = self._files.stage()
        try:
            for part_id in ids:
                for chunk in self._blobs.read(part_id):
                    staged.write(chunk)
            staged.close()
            if md5 is not None and staged.md5 != md5.lower():
                raise ApiError(400, "The parts together have another md5.", param="md5", code="checksum_mismatch")
            return self._finish(request, staged)
        except FileNotFoundError:  # completed or cancelled in the meantime
            with self._database.session() as session:
                return self._completed(self._find_upload(session, project, name))
        finally:
            staged.discard()

    def _completed(self, upload: Upload) -> tuple[Upload, File]:
        with self._database.session() as session:
            if upload.status != "completed" or upload.file is None:
                raise ApiError(400, f"The upload is {upload.status}.", code=f"upload_{upload.status}")
            return upload, self._files.of(session, upload.project, upload.file)

    def _finish(self, request: Request, staged: Staged) -> tuple[Upload, File]:
        with self._database.writing.begin() as session:
            self._database.exclusive(session, f"upload {request.parameters['upload']}")
            upload = self._find_upload(session, request.key.project, request.parameters["upload"])
            if upload.status == "completed":
                return self._completed(upload)
            upload = self._open(request, session)
            unused = self._drop_parts(session, upload)  # first, so that their bytes do not count any more
            file = self._files.add(
                session, staged, project=upload.project, key=upload.key, filename=upload.filename,
                purpose=upload.purpose, seconds=upload.file_seconds,
            )  # fmt: skip
            upload.status, upload.file = "completed", file.id
            audit.note(session, request, "upload.completed", upload.id, file=file.id)
        self._remove(unused)
        return upload, file

    def _cancel(self, request: Request) -> Upload:
        with self._database.writing.begin() as session:
            self._database.exclusive(session, f"upload {request.parameters['upload']}")
            upload = self._find_upload(session, request.key.project, request.parameters["upload"])
            if upload.status == "cancelled":
                return upload
            upload = self._open(request, session)
            upload.status = "cancelled"
            audit.note(session, request, "upload.cancelled", upload.id)
            unused = self._drop_parts(session, upload)
        self._remove(unused)
        return upload

    def sweep(self) -> None:
        """Delete the parts of expired uploads."""
        with self._database.writing.begin() as session:
            query = select(Upload).where(Upload.status == "pending", Upload.expires_at <= unix_time()).limit(1000)
            unused = []
            for upload in session.scalars(query.with_for_update()):  # one that is being completed is no longer pending
                upload.status = "expired"
                unused += self._drop_parts(session, upload)
        self._remove(unused)

    def stored_parts(self) -> list[str]:
        """Return the ids of all blobs that belong to pending uploads."""
        with self._database.session() as session:
            return list(session.scalars(select(Part.id)))

    @staticmethod
    def _bytes_of(session: Session, project: str) -> int:
        """Sum the bytes of the parts of a project's pending uploads."""
        parts = select(func.coalesce(func.sum(Part.bytes), 0)).join(Upload, Upload.id == Part.upload)
        return session.scalar(parts.where(Upload.project == project)) or 0

    @staticmethod
    def _drop_parts(session: Session, upload: Upload) -> list[str]:
        ids = list(session.scalars(select(Part.id).where(Part.upload == upload.id)))
        session.execute(delete(Part).where(Part.upload == upload.id))
        return ids

    def _remove(self, parts: Sequence[str]) -> None:
        for part in parts:
            self._blobs.remove(part)


def describe_upload(row: Upload, file: File | None = None) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "upload",
        "bytes": row.bytes,
        "created_at": row.created_at,
        "filename": row.filename,
        "purpose": row.purpose,
        "status": row.status,
        "expires_at": row.expires_at,
        "file": None if file is None else describe_file(file),
    }
