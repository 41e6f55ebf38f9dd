"""What works on batches: the same after a restart as before, since all that it knows is in the database and a folder."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from sqlalchemy import select

from dstune.serve.errors import ApiError
from dstune.serve.finetuning.batches.ask import ask
from dstune.serve.finetuning.batches.lines import Answers, Line, LineError, check_lines, read_lines
from dstune.serve.finetuning.files import Files
from dstune.serve.finetuning.ids import new_id, unix_time
from dstune.serve.finetuning.tables import Batch
from dstune.serve.finetuning.webhooks import Webhooks
from dstune.serve.gateway.app import Gateway
from dstune.serve.store.database import Database
from dstune.serve.store.keys import Caller, Keys

log = logging.getLogger("dstune.serve")

WORKED_ON = ("validating", "in_progress", "finalizing", "cancelling")
LEASE_SECONDS = 60.0
AT_ONCE = 4
"""Requests of a batch."""
LOOK_SECONDS = 1.0
FILE_BYTES = 200_000_000


class BatchWorker:
    """folder: of all batches."""

    def __init__(self, database: Database, folder: Path, files: Files, webhooks: Webhooks, gateway: Gateway):
        self._database, self._folder, self._files, self._webhooks = database, folder, files, webhooks
        self._gateway, self._keys = gateway, Keys(database)

    async def run(self) -> None:
        while True:
            worked = False
            try:
                row = await asyncio.to_thread(self._claim)
                if row is not None:
                    worked = True
                    await self._work(row)
            except Exception:
                log.exception("a batch could not be worked on; it is tried again")
            if not worked:
                await asyncio.sleep(LOOK_SECONDS)

    def _claim(self) -> Batch | None:
        now = time.time()
        with self._database.writing.begin() as session:
            self._database.exclusive(session, "batches")
            query = select(Batch).where(Batch.status.in_(WORKED_ON), Batch.lease_until < now).order_by(Batch.number)
            row = session.scalars(query.limit(1)).first()
            if row is not None:
                row.lease_until = now + LEASE_SECONDS
        return row

    def _change(self, row: Batch, status: str | None = None, event: str | None = None, **details: Any) -> Batch:
        """One transaction: a new status, what is told of it, and the event."""
        with self._database.writing.begin() as session:
            current = session.get_one(Batch, row.number)
            if status is not None and not (current.status == "cancelling" and status == "in_progress"):
                current.status = status
            current.details = {**current.details, **details}
            current.lease_until = time.time() + LEASE_SECONDS
            if event is not None:
                self._webhooks.enqueue(session, current.project, f"batch.{event}", current.id)
        return current

    async def _work(self, row: Batch) -> None:
        folder = self._folder / row.id
        await asyncio.to_thread(folder.mkdir, mode=0o700, parents=True, exist_ok=True)
        if row.status == "validating":
            row = await asyncio.to_thread(self._validate, row, folder)
        expired = False
        if row.status == "in_progress":
            caller = await asyncio.to_thread(self._keys.by_id, row.key)
            if caller is None:
                await asyncio.to_thread(self._fail, row, [LineError(None, "invalid_api_key", "The key was revoked.")])
                return
            row, expired = await self._answer(row, folder, caller)
        if row.status in ("in_progress", "finalizing", "cancelling"):
            await asyncio.to_thread(self._finalize, row, folder, expired)
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _validate(self, row: Batch, folder: Path) -> Batch:
        path = folder / "input.jsonl"
        path.unlink(missing_ok=True)
        try:
            with self._database.session() as session:
                file = self._files.of(session, row.project, row.input_file)
                if file.bytes > FILE_BYTES:
                    error = LineError(None, "file_too_large", f"A batch's file has at most {FILE_BYTES} bytes.")
                    return self._fail(row, [error])
                self._files.snapshot(file, path)
        except (ApiError, FileNotFoundError):
            return self._fail(row, [LineError(None, "file_not_found", "The input file was deleted.")])
        count, errors = check_lines(path, row.endpoint)
        if errors:
            return self._fail(row, errors)
        counts = {"total": count, "completed": 0, "failed": 0}
        return self._change(row, "in_progress", in_progress_at=unix_time(), request_counts=counts)

    def _fail(self, row: Batch, errors: list[LineError]) -> Batch:
        described = [error.described() for error in errors]
        return self._change(row, "failed", "failed", failed_at=unix_time(), errors=described)

    async def _answer(self, row: Batch, folder: Path, caller: Caller) -> tuple[Batch, bool]:
        """Put what has no answer yet; the row as it is then, and whether its time ran out."""
        good = await asyncio.to_thread(Answers, folder / "output.jsonl")
        bad = await asyncio.to_thread(Answers, folder / "errors.jsonl")
        lines = [
            line
            for line in await asyncio.to_thread(lambda: list(read_lines(folder / "input.jsonl", row.endpoint)))
            if isinstance(line, Line) and line.custom_id not in good.ids | bad.ids
        ][::-1]
        expires = row.details["expires_at"]

        async def take() -> None:
            while lines:
                line = lines.pop()
                response = await ask(self._gateway, caller, row.endpoint, line.body)
                answer = {"id": new_id("batch_req_"), "custom_id": line.custom_id, "response": response, "error": None}
                answers = good if response["status_code"] < 400 else bad
                await asyncio.to_thread(answers.add, answer)

        async def watch() -> None:
            while row.status == "in_progress" and unix_time() < expires:
                await asyncio.sleep(LOOK_SECONDS)
                await keep()

        async def keep() -> None:
            nonlocal row
            counts = {
                "total": row.details["request_counts"]["total"],
                "completed": len(good.ids),
                "failed": len(bad.ids),
            }
            row = await asyncio.to_thread(self._change, row, request_counts=counts)

        await _until(watch, [take] * AT_ONCE)
        await keep()
        return row, unix_time() >= expires and len(good.ids) + len(bad.ids) < row.details["request_counts"]["total"]

    def _finalize(self, row: Batch, folder: Path, expired: bool) -> None:
        ending = "cancelled" if row.status == "cancelling" else "expired" if expired else "completed"
        if row.status == "in_progress":
            row = self._change(row, "finalizing", finalizing_at=unix_time())
        staged = {}
        try:
            for name, path in (("output_file_id", "output.jsonl"), ("error_file_id", "errors.jsonl")):
                if (folder / path).is_file() and (folder / path).stat().st_size:
                    staged[name] = self._files.stage()
                    with (folder / path).open("rb") as file:
                        while chunk := file.read(1 << 20):
                            staged[name].write(chunk)
                    staged[name].close()
            self._end(row, staged, ending)
        finally:
            for one in staged.values():
                one.discard()

    def _end(self, row: Batch, staged: dict[str, Any], ending: str) -> None:
        with self._database.writing.begin() as session:
            current = session.get_one(Batch, row.number)
            made = {}
            for name, one in staged.items():
                file = self._files.add(
                    session, one, project=row.project, key=row.key, filename=f"{row.id}_{name.split('_')[0]}.jsonl",
                    purpose="batch_output", seconds=row.output_seconds,
                )  # fmt: skip
                made[name] = file.id
            current.status = ending
            current.details = {**current.details, **made, f"{ending}_at": unix_time()}
            self._webhooks.enqueue(session, row.project, f"batch.{ending}", row.id)


Work = Callable[[], Coroutine[Any, Any, None]]


async def _until(watch: Work, workers: list[Work]) -> None:
    """Run all workers until they are done, or until `watch` ends; what they are at is dropped then."""

    async def work() -> None:
        async with asyncio.TaskGroup() as group:
            for worker in workers:
                group.create_task(worker())

    watching, working = asyncio.create_task(watch()), asyncio.create_task(work())
    try:
        await asyncio.wait({watching, working}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        watching.cancel()
        working.cancel()
        await asyncio.gather(watching, working, return_exceptions=True)
